"""Pictures of a capacity answer. Every point that is drawn is also a row of ``figures``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from muxtune.report.html import Image
from muxtune.report.plots import MARKERS, PALETTE, _axes, _category_axis, _clean, _figure, _save
from muxtune.report.timelines import busy_spans, mean_count, share_done, thinned

Row = dict[str, Any]
Tables = Mapping[str, Sequence[Row]]
SIDES = ("low", "high")
ASSUMPTIONS = {
    "price": "price of a GPU",
    "load": "load (arrivals)",
    "lengths": "lengths of sequences",
    "times": "error of the cost model",
}


class Drawing(NamedTuple):
    """A picture, what to see in it, and the rows that it is drawn from."""

    name: str
    caption: str
    path: Path
    rows: list[Row]

    @property
    def image(self) -> Image:
        return Image(self.path, f"{self.caption} (figures.csv, figure = {self.name})")


def draw_all(folder: Path, tables: Tables) -> list[Drawing]:
    """In the order in which a reader wants them; one without data is left out."""
    makers: list[tuple[str, str, Callable[..., list[Row]]]] = [
        ("cost", "What the smallest fleet of each policy costs a month; bars: interval over "
         "the draws. Hatched: no fleet keeps the service level", _cost),
        ("service", "Service level against fleet size, mean and range of the draws, on the "
         "recommended device; dotted: what is asked for. Hollow: too "
         "small, since it gets more work than it has time for, whatever it serves here", _service),
        ("completion", "How long tasks took on the answer's fleets, first draw", _completion),
        ("pareto", "Cost against the completion time of the slowest hundredth of the tasks; "
         "line: what nothing betters in both", _pareto),
        ("sensitivity", "What the recommended fleet costs when one assumption is moved and the "
         "fleet is searched for again on the same draws", _sensitivity),
        ("over_time", "Instances at work and tasks waiting over time, first draw", _over_time),
    ]  # fmt: skip
    drawings = []
    for name, caption, make in makers:
        path = folder / f"{name}.png"
        rows = make(path, tables)
        if rows:
            named = [{"figure": name} | row for row in rows]
            drawings.append(Drawing(name, caption, path, named))
    return drawings


def _point(series: str, x: object, y: float | None, low: Any = None, high: Any = None) -> Row:
    return {"series": series, "x": x, "y": y, "y_low": low, "y_high": high}


def _label(row: Row) -> str:
    return f"{row['policy']}, {row['device']}"


def _device(tables: Tables) -> str:
    """The recommended one, or that of the first answer."""
    answers = tables["answers"]
    chosen = next((row for row in answers if row["recommended"]), answers[0])
    return chosen["device"]


def _on_device(tables: Tables) -> list[Row]:
    device = _device(tables)
    return [row for row in tables["answers"] if row["device"] == device]


def _colour_of(tables: Tables) -> dict[str, int]:
    names = dict.fromkeys(row["policy"] for row in tables["answers"])
    return {name: index % len(PALETTE) for index, name in enumerate(names)}


# ------------------------------------------------------------------------------------------- cost


def _cost(path: Path, tables: Tables) -> list[Row]:
    answers, colours = tables["answers"], _colour_of(tables)
    figure, axes = _axes(max(5.0, 1.25 * len(answers) + 1.5), 4.6)
    rows = []
    for index, row in enumerate(answers):
        usd = row["usd_per_month"] / 1_000
        low, high = row["usd_per_month_low"], row["usd_per_month_high"]
        axes.bar(
            index, usd, 0.65, color=PALETTE[colours[row["policy"]]],
            hatch="" if row["feasible"] else "///", alpha=1.0 if row["feasible"] else 0.4,
        )  # fmt: skip
        if low is not None and row["feasible"]:
            ends = [[max(0.0, usd - low / 1_000)], [max(0.0, high / 1_000 - usd)]]
            axes.errorbar(index, usd, yerr=ends, color="black", capsize=4)
        axes.annotate(
            f"{row['num_gpus']} GPUs", (index, usd), (0, 5), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
        rows.append(_point(_label(row), index, row["usd_per_month"], low, high))
    _category_axis(axes, [f"{row['policy']}\n{row['device']}" for row in answers])
    axes.set_ylabel("cost (thousand USD a month)")
    axes.margins(y=0.15)
    _title(axes, "Cost of the smallest fleet that keeps the service level")
    _save(figure, path)
    return rows


def _title(axes: Axes, text: str) -> None:
    _clean(axes)
    axes.set_title(text, loc="left", fontsize=12)


# ---------------------------------------------------------------------------------------- service


def _service(path: Path, tables: Tables) -> list[Row]:
    device, colours = _device(tables), _colour_of(tables)
    figure, axes = _axes(7.5, 4.4)
    rows = []
    for policy, index in colours.items():
        points = _served(tables, policy, device)
        rows += [_point(policy, size, *shares) for size, shares in points.items()]
        if points:
            sizes, means = list(points), [item[0] for item in points.values()]
            spread = np.array([[m - low, high - m] for m, low, high in points.values()]).T
            axes.errorbar(
                sizes, means, yerr=np.maximum(spread, 0.0), label=policy, capsize=3,
                color=PALETTE[index], marker=MARKERS[index], zorder=2,
            )  # fmt: skip
            short = [size for size in sizes if not _keeps_up(tables, policy, device, size)]
            axes.plot(
                short, [points[size][0] for size in short], MARKERS[index], zorder=3,
                markerfacecolor="white", markeredgecolor=PALETTE[index],
            )  # fmt: skip
    target = next(row for row in tables["question"] if row["name"].startswith("service level"))
    axes.axhline(target["value"], color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("share of tasks served as promised")
    axes.legend(frameon=False)
    _title(axes, f"Service level against fleet size ({device})")
    _save(figure, path)
    return rows


def _keeps_up(tables: Tables, policy: str, device: str, num_gpus: int) -> bool:
    """In the mean of the draws. True over several base models, whose sizes are no rows."""
    of_size = [
        row["busy_share"]
        for row in tables["fleets"]
        if (row["policy"], row["device"], row["num_gpus"]) == (policy, device, num_gpus)
    ]
    return len(tables["workload"]) > 1 or float(np.mean(of_size)) <= 1.0


def _served(tables: Tables, policy: str, device: str) -> dict[int, tuple[float, float, float]]:
    """By number of GPUs: mean, lowest and highest share of the draws. Of several base models the
    fleets are shown that grow or shrink together: the first fleet of each, the second of each."""
    mine = [r for r in tables["fleets"] if r["policy"] == policy and r["device"] == device]
    models = list(dict.fromkeys(row["model"] for row in mine))
    sizes = {
        model: sorted({row["num_gpus"] for row in mine if row["model"] == model})
        for model in models
    }
    found: dict[int, tuple[float, float, float]] = {}
    for rank in range(max((len(item) for item in sizes.values()), default=0)):
        chosen = {model: item[min(rank, len(item) - 1)] for model, item in sizes.items()}
        of_seed: dict[int, list[tuple[float, float]]] = {}
        for row in mine:
            if row["num_gpus"] == chosen[row["model"]]:
                pair = (row["num_counted"], row["served_share"])
                of_seed.setdefault(row["seed"], []).append(pair)
        shares = [sum(n * s for n, s in p) / max(1, sum(n for n, _ in p)) for p in of_seed.values()]
        total = sum(chosen.values())
        found[total] = (float(np.mean(shares)), min(shares), max(shares))
    return dict(sorted(found.items()))


# ------------------------------------------------------------------------------------- completion


def _completion(path: Path, tables: Tables) -> list[Row]:
    device, colours = _device(tables), _colour_of(tables)
    figure, axes = _axes(7.5, 4.4)
    rows = []
    for policy, index in colours.items():
        times_s = [row["completion_time_s"] for row in _done(tables, policy, device)]
        if not times_s:
            continue
        ordered, shares = share_done(times_s)
        shown = thinned(ordered)
        rows += [_point(policy, float(ordered[i]), float(shares[i])) for i in shown]
        axes.step(ordered / 60, shares, where="post", label=policy, color=PALETTE[index])
    axes.set_xscale("log")
    axes.set_xlabel("completion time (minutes, log scale)")
    axes.set_ylabel("share of tasks done")
    axes.legend(frameon=False)
    _title(axes, f"From arrival to adapter, on the answers' fleets ({device})")
    _save(figure, path)
    return rows


def _done(tables: Tables, policy: str, device: str) -> list[Row]:
    return [
        row
        for row in tables["tasks"]
        if row["policy"] == policy and row["device"] == device and row["state"] == "done"
    ]


# ----------------------------------------------------------------------------------------- pareto


def _pareto(path: Path, tables: Tables) -> list[Row]:
    good = [r for r in tables["answers"] if r["p99_completion_time_s"] is not None]
    if not good:
        return []
    figure, axes = _axes(7.5, 4.4)
    colours, devices = _colour_of(tables), list(dict.fromkeys(row["device"] for row in good))
    for row in good:
        axes.scatter(
            row["p99_completion_time_s"] / 3_600, row["usd_per_month"] / 1_000, s=70,
            color=PALETTE[colours[row["policy"]]],
            marker=MARKERS[devices.index(row["device"]) % len(MARKERS)], label=_label(row),
            alpha=1.0 if row["feasible"] else 0.35,
        )  # fmt: skip
    front = pareto_front(
        [(row["p99_completion_time_s"], row["usd_per_month"]) for row in good if row["feasible"]]
    )
    axes.plot(
        [x / 3_600 for x, _ in front], [y / 1_000 for _, y in front], color="black", linewidth=0.8
    )
    axes.set_xlabel("99th percentile of completion time (hours)")
    axes.set_ylabel("cost (thousand USD a month)")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _title(axes, "Cost against the slowest tasks")
    _save(figure, path)
    return [_point(_label(row), row["p99_completion_time_s"], row["usd_per_month"]) for row in good]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other betters in both coordinates, by the first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


# ------------------------------------------------------------------------------------ sensitivity


def _sensitivity(path: Path, tables: Tables) -> list[Row]:
    """A tornado: the widest bar on top; numbers at the ends say where the assumption stood."""
    moved = [row for row in tables["sensitivity"] if row["change"] is not None]
    if not moved:
        return []
    names = sorted(
        {row["assumption"] for row in moved},
        key=lambda name: max(abs(r["change"]) for r in moved if r["assumption"] == name),
    )
    figure, axes = _axes(7.5, 0.75 * len(names) + 1.8)
    for row in moved:
        height, change = names.index(row["assumption"]), row["change"] * 100
        axes.barh(height, change, 0.6, color=PALETTE[SIDES.index(row["side"])])
        axes.annotate(
            f"x {row['moved_to']:.2f}", (change, height), (4 if change >= 0 else -4, 0),
            textcoords="offset points", va="center", ha="left" if change >= 0 else "right",
            fontsize=8,
        )  # fmt: skip
    for side, index in zip(SIDES, range(2), strict=True):
        axes.barh(0, 0, color=PALETTE[index], label=f"assumption moved {side}")
    axes.set_yticks(range(len(names)), [ASSUMPTIONS[name] for name in names])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.2)
    axes.set_xlabel("change of the cost (%)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _title(axes, "What the answer hangs on")
    axes.grid(visible=False)
    _save(figure, path)
    return [
        _point(f"{row['assumption']} {row['side']}", row["moved_to"], row["change"])
        for row in moved
    ]


# -------------------------------------------------------------------------------------- over time


def _over_time(path: Path, tables: Tables) -> list[Row]:
    device, colours = _device(tables), _colour_of(tables)
    figure = _figure(9.5, 4.0)
    busy_axes, queue_axes = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    shown = [row["ended_s"] for policy in colours for row in _done(tables, policy, device)]
    until_s, rows = max(shown, default=0.0), []
    for policy, index in colours.items():
        done = _done(tables, policy, device)
        if not done:
            continue
        arrival_s = np.array([row["arrival_s"] for row in done])
        started_s = np.array([row["started_s"] for row in done])
        ended_s = np.array([row["ended_s"] for row in done])
        names = [f"{row['model']}/{row['instance_id']}" for row in done]
        panels = (
            (busy_axes, "instances at work", busy_spans(names, started_s, ended_s)),
            (queue_axes, "tasks waiting", (arrival_s, started_s)),
        )
        for axes, what, (starts, ends) in panels:
            at_s, count = mean_count(starts, ends, until_s)
            axes.plot(at_s / 3_600, count, label=policy, color=PALETTE[index])
            rows += [
                _point(f"{what}, {policy}", float(x), float(y))
                for x, y in zip(at_s, count, strict=True)
            ]
    for axes, what in ((busy_axes, "instances at work"), (queue_axes, "tasks waiting")):
        axes.set_xlabel("time (hours)")
        axes.set_ylabel(what)
        _clean(axes)
    handles, labels = busy_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Over time, on the answers' fleets ({device})", fontsize=12)
    _save(figure, path)
    return rows

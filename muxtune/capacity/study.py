"""A capacity question answered: searches, comparisons, limits and sensitivities, as tables.

Every table is a list of flat rows, numbered by ``row``; whatever a report shows it takes from a
cell of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from muxtune.capacity.choices import PolicyChoice
from muxtune.capacity.jobs import (
    Alternative,
    BaseModels,
    Best,
    Crew,
    RelativeError,
    Search,
    Settle,
    Settled,
    as_asked,
    finite,
    pooled_share,
)
from muxtune.capacity.laboratory import AS_ASKED, Case, Pool, Run, Variant
from muxtune.capacity.prices import Price
from muxtune.capacity.search import Found
from muxtune.capacity.service import ServiceLevel, Times, service_row
from muxtune.config import CapacityConfig
from muxtune.cost.devices import DeviceFigures
from muxtune.report.statistics import CONFIDENCE, bootstrap_interval, paired_saving

RELAXED_MEMORY, RELAXED_TIMES = 2.0, 0.8
LIMITS = {
    "memory": Variant(memory=RELAXED_MEMORY),
    "compute": Variant(times=RELAXED_TIMES),
    "arrivals": Variant(even=True),
}
AS_IT_IS = "as it is"
MILLION = 1_000_000
Row = dict[str, Any]


class Option(NamedTuple):
    """A policy on a kind of device, over all base models."""

    policy: str
    device: str


class Outcome(NamedTuple):
    """What was found for one option. ``settled`` and ``per_seed`` are by base model; ``reason``
    is empty where the service level is met."""

    option: Option
    settled: Mapping[str, Settled]
    per_seed: Mapping[str, Sequence[Found]]
    reason: str

    @property
    def feasible(self) -> bool:
        return not self.reason

    @property
    def num_gpus(self) -> int:
        return sum(item.num_gpus or 0 for item in self.settled.values())

    def runs(self) -> list[tuple[Run, ...]]:
        """Of the answer: by base model, then by seed."""
        return [item.runs[item.num_gpus or 0] for item in self.settled.values()]


class Study(NamedTuple):
    """Tables by name, and which option is recommended; None where none is feasible."""

    tables: dict[str, list[Row]]
    recommended: Option | None


def run_study(
    config: CapacityConfig,
    choices: Sequence[PolicyChoice],
    prices: Mapping[str, Price],
    figures: Mapping[str, DeviceFigures],
    crew: Crew,
) -> Study:
    """Raises MuxTuneError for tasks that cannot be simulated."""
    return _Student(config, choices, prices, figures, crew).study()


class _Student:
    def __init__(
        self,
        config: CapacityConfig,
        choices: Sequence[PolicyChoice],
        prices: Mapping[str, Price],
        figures: Mapping[str, DeviceFigures],
        crew: Crew,
    ) -> None:
        self.config, self.prices, self.figures, self.crew = config, prices, figures, crew
        self.options = [Option(choice.name, device) for device in prices for choice in choices]
        self.seeds = tuple(range(config.seed, config.seed + config.num_seeds))
        self.level = ServiceLevel(**vars(config.service_level)).checked()
        self.outcomes: dict[Option, Outcome] = {}
        self.workload: list[Row] = []

    def study(self) -> Study:
        self.workload = list(self.crew.do("tasks", [BaseModels(self.seeds[0])])[0].values())
        for option, outcome in self._search().items():
            self.outcomes[option] = outcome
        answers = [self._answer(option) for option in self.options]
        recommended = self._recommended(answers)
        for answer in answers:
            answer["recommended"] = Option(answer["policy"], answer["device"]) == recommended
        self._add_break_even(answers)
        tables = {
            "question": self._question(),
            "workload": self.workload,
            "answers": answers,
            "base_models": [row for option in self.options for row in self._by_model(option)],
            "seeds": list(self._seed_rows()),
            "fleets": list(self._fleet_rows()),
            "limits": self._limits(),
            "sensitivity": self._sensitivity(recommended) if recommended else [],
            "tasks": list(self._task_rows()),
        }
        numbered = {
            name: [{"row": number} | row for number, row in enumerate(rows)]
            for name, rows in tables.items()
        }
        return Study(numbered, recommended)

    @property
    def models(self) -> list[str]:
        return [row["model"] for row in self.workload]

    # -- searching

    def _search(self) -> dict[Option, Outcome]:
        pools = [Pool(*option, model) for option in self.options for model in self.models]
        firsts = self.crew.do(
            "first draw", [Search(as_asked(p, self.seeds[0]), None) for p in pools]
        )
        jobs = [
            Search(as_asked(pool, seed), first.num_gpus)
            for pool, first in zip(pools, firsts, strict=True)
            for seed in self.seeds[1:]
            if first.num_gpus is not None
        ]
        others = iter(self.crew.do("other draws", jobs))
        found = {
            pool: [first, *(next(others) for _ in self.seeds[1:] if first.num_gpus is not None)]
            for pool, first in zip(pools, firsts, strict=True)
        }
        settled = self._settle(found)
        return {option: self._outcome(option, found, settled) for option in self.options}

    def _settle(self, found: Mapping[Pool, Sequence[Found]]) -> dict[Pool, tuple[str, Settled]]:
        jobs: dict[Pool, Any] = {}
        for pool, searches in found.items():
            sizes = [item.num_gpus for item in searches if item.num_gpus is not None]
            whole = len(sizes) == len(self.seeds)
            jobs[pool] = (
                Settle(pool, self.seeds, min(sizes), max(sizes))
                if whole
                else Best(pool, self.seeds[:1])
            )
        answers = self.crew.do("all draws", list(jobs.values()))
        return {
            pool: self._verdict(pool, answer) for pool, answer in zip(jobs, answers, strict=True)
        }

    def _verdict(self, pool: Pool, answer: Any) -> tuple[str, Settled]:
        """Why there is no fleet, or nothing; and the fleet, or the best there is."""
        if isinstance(answer, Settled):
            return "" if answer.num_gpus is not None else "no size serves all draws", answer
        alone, settled = answer
        if alone < self.level.share:
            reason = (
                f"{1 - alone:.1%} of the tasks on {pool.model} break the promise even with an "
                f"idle {pool.device} to themselves, so no number of them helps"
            )
        else:
            reason = (
                f"max_gpus={self.config.max_gpus} of {pool.device} are too few for {pool.model}"
            )
        return reason, settled

    def _outcome(
        self,
        option: Option,
        found: Mapping[Pool, Sequence[Found]],
        settled: Mapping[Pool, tuple[str, Settled]],
    ) -> Outcome:
        pools = {model: Pool(*option, model) for model in self.models}
        reasons = [settled[pool][0] for pool in pools.values() if settled[pool][0]]
        return Outcome(
            option,
            {model: settled[pool][1] for model, pool in pools.items()},
            {model: found[pool] for model, pool in pools.items()},
            "; ".join(reasons),
        )

    # -- answers

    def _answer(self, option: Option) -> Row:
        outcome, price = self.outcomes[option], self.prices[option.device]
        runs = outcome.runs()
        costs = self._costs_per_seed(option)
        interval = bootstrap_interval(costs) if costs else None
        return {
            **option._asdict(),
            "feasible": outcome.feasible,
            "reason": outcome.reason,
            "num_gpus": outcome.num_gpus,
            **self._money(outcome.num_gpus, runs, price.usd_per_gpu_hour),
            "usd_per_month_of_draws": interval.value if interval else None,
            "usd_per_month_low": finite(interval.low) if interval else None,
            "usd_per_month_high": finite(interval.high) if interval else None,
            **self._savings(option, self.config.baseline, option.device, "same_device"),
            **self._savings(option, *self._best_baseline(), "best_baseline"),
            **self._use(option, runs),
            **pooled_service(runs, self.level),
            "monotone": all(item.monotone for found in outcome.per_seed.values() for item in found),
        }

    def _by_model(self, option: Option) -> Iterable[Row]:
        outcome, price = self.outcomes[option], self.prices[option.device]
        for model, item in outcome.settled.items():
            runs = [item.runs[item.num_gpus or 0]]
            num_gpus = item.num_gpus or 0
            yield {
                **option._asdict(),
                "model": model,
                "num_gpus": num_gpus,
                **self._money(num_gpus, runs, price.usd_per_gpu_hour),
                **self._use(option, runs),
                **pooled_service(runs, self.level),
            }

    def _money(self, num_gpus: int, runs: Sequence[Sequence[Run]], usd: float) -> Row:
        """Tokens: those of the tasks that arrive, in the time in which they arrive."""
        tokens_per_s = sum(
            float(np.mean([run.row["effective_tokens"] / run.row["horizon_s"] for run in of_model]))
            for of_model in runs
        )
        usd_per_s = num_gpus * usd / 3_600
        return {
            "usd_per_gpu_hour": usd,
            "gpu_hours_per_month": num_gpus * self.config.hours_per_month,
            "usd_per_month": num_gpus * usd * self.config.hours_per_month,
            "effective_tokens_per_s": tokens_per_s,
            "usd_per_million_tokens": usd_per_s / tokens_per_s * MILLION if tokens_per_s else None,
        }

    def _costs_per_seed(self, option: Option) -> list[float]:
        """A month of the smallest fleet of each draw; nothing where one draw has none."""
        outcome = self.outcomes[option]
        if not outcome.feasible:
            return []
        usd = self.prices[option.device].usd_per_gpu_hour * self.config.hours_per_month
        by_model = [[item.num_gpus or 0 for item in found] for found in outcome.per_seed.values()]
        return [usd * sum(sizes) for sizes in zip(*by_model, strict=True)]

    def _best_baseline(self) -> Option:
        """The baseline on the device on which it costs least."""
        mine = [option for option in self.options if option.policy == self.config.baseline]
        return min(mine, key=lambda option: (self._cost(option), option.device))

    def _cost(self, option: Option) -> float:
        costs = self._costs_per_seed(option)
        return sum(costs) / len(costs) if costs else math.inf

    def _savings(self, option: Option, policy: str, device: str, name: str) -> Row:
        """Relative, of the mean cost; the interval draws seeds in pairs."""
        ours, theirs = self._costs_per_seed(option), self._costs_per_seed(Option(policy, device))
        interval = paired_saving(theirs, ours) if ours and theirs else None
        return {
            f"saving_{name}": interval.value if interval else None,
            f"saving_{name}_low": finite(interval.low) if interval else None,
            f"saving_{name}_high": finite(interval.high) if interval else None,
        }

    def _use(self, option: Option, runs: Sequence[Sequence[Run]]) -> Row:
        """Means over GPUs and draws. ``energy``: the GPUs' boards at their rated power."""
        flat = [run.row for of_model in runs for run in of_model]
        weights = np.array([row["num_gpus"] for row in flat], dtype=np.float64)

        def mean(name: str) -> float | None:
            values = [row[name] for row in flat]
            if any(value is None for value in values):
                return None
            return float(np.average(np.array(values, dtype=np.float64), weights=weights))

        busy = min(1.0, mean("busy_share") or 0.0)
        idle_power = self.config.cluster.idle_power_share
        watts = self.figures[option.device].power_w * (busy + (1.0 - busy) * idle_power)
        num_gpus = sum(of_model[0].row["num_gpus"] for of_model in runs)
        hours = self.config.hours_per_month
        return {
            "busy_share": mean("busy_share"),
            "effective_share": mean("effective_share"),
            "effective_utilisation": mean("effective_utilisation"),
            "memory_headroom_share": min(row["memory_headroom_share"] for row in flat),
            "mean_tasks_per_busy_instance": mean("mean_tasks_per_busy_instance"),
            "energy_kwh_per_month": num_gpus * watts * hours / 1_000 if watts else None,
        }

    def _recommended(self, answers: Sequence[Row]) -> Option | None:
        feasible = [row for row in answers if row["feasible"]]
        if not feasible:
            return None
        best = min(feasible, key=lambda row: (row["usd_per_month"], row["num_gpus"]))
        return Option(best["policy"], best["device"])

    def _add_break_even(self, answers: Sequence[Row]) -> None:
        """The price of a GPU at which an option costs as much as the recommended one."""
        best_usd = next((row["usd_per_month"] for row in answers if row["recommended"]), None)
        for row in answers:
            known = row["feasible"] and best_usd is not None
            usd = best_usd / row["gpu_hours_per_month"] if known else None
            row["break_even_usd_per_gpu_hour"] = usd

    # -- tables of what was looked at

    def _question(self) -> list[Row]:
        config, level = self.config, self.level
        named = {
            "service level: share of tasks": level.share,
            "starts within (s)": level.max_start_delay_s,
            "ends within times its time alone": level.max_slowdown,
            "confidence of the intervals": CONFIDENCE,
            "draws of the tasks": config.num_seeds,
            "first draw": config.seed,
            "share of arrivals not counted": config.warmup_share,
            "hours a month": config.hours_per_month,
            "power of an idle GPU over a busy one": config.cluster.idle_power_share,
            "largest fleet of a base model": config.max_gpus,
        }
        rows: list[Row] = [
            {"name": name, "value": value, "text": ""} for name, value in named.items()
        ]
        texts = {
            "time alone counted from": level.slowdown_from,
            "reference device": config.cluster.device,
            "baseline": config.baseline,
            "cost model": config.cost.kind,
        }
        rows += [{"name": name, "value": None, "text": text} for name, text in texts.items()]
        for price in self.prices.values():
            for label, usd in (
                ("", price.usd_per_gpu_hour),
                ("low ", price.low),
                ("high ", price.high),
            ):
                name = f"{label}price of {price.device} (USD per GPU and hour)"
                text = f"{price.date} {price.source}".strip()
                rows.append({"name": name, "value": usd, "text": text})
        return rows

    def _seed_rows(self) -> Iterable[Row]:
        for option, outcome in self.outcomes.items():
            for model, found in outcome.per_seed.items():
                for seed, item in zip(self.seeds, found, strict=False):
                    yield {
                        **option._asdict(),
                        "model": model,
                        "seed": seed,
                        "num_gpus": item.num_gpus,
                        "monotone": item.monotone,
                        "sizes_looked_at": " ".join(map(str, item.shares)),
                    }

    def _fleet_rows(self) -> Iterable[Row]:
        for outcome in self.outcomes.values():
            for item in outcome.settled.values():
                for num_gpus in sorted(item.runs):
                    for run in item.runs[num_gpus]:
                        yield {"answer": num_gpus == item.num_gpus} | run.row

    def _task_rows(self) -> Iterable[Row]:
        """Tasks of the first draw on the answer's fleets."""
        for option, outcome in self.outcomes.items():
            for of_model in outcome.runs():
                for task in of_model[0].outcomes:
                    started = task.placed_ns if task.first_start_ns is None else task.first_start_ns
                    yield {
                        **option._asdict(),
                        "model": task.model,
                        "task_id": task.task_id,
                        "tenant": task.tenant,
                        "state": str(task.state),
                        "arrival_s": task.arrival_ns / 1e9,
                        "started_s": None if started is None else started / 1e9,
                        "ended_s": task.ended_ns / 1e9,
                        "completion_time_s": (task.ended_ns - task.arrival_ns) / 1e9,
                        "instance_id": task.instance_id,
                        "steps": task.steps,
                        "effective_tokens": task.effective_tokens,
                    }

    # -- what limits, and what the answer hangs on

    def _limits(self) -> list[Row]:
        """One fleet too small by one step, with each resource relaxed in turn."""
        seeds = self._few_seeds()
        jobs, about = [], []
        for option, outcome in self.outcomes.items():
            for model, item in outcome.settled.items():
                pool = Pool(*option, model)
                short = self._too_small(item)
                if not outcome.feasible or short is None:
                    continue
                for name, variant in {AS_IT_IS: AS_ASKED, **LIMITS}.items():
                    jobs.append(Alternative(pool, seeds, short, variant))
                    about.append((pool, short, name))
        runs = self.crew.do("what limits", jobs)
        rows = [
            {
                **pool._asdict(),
                "num_gpus": short,
                "relaxed": name,
                "served_share": pooled_share(found),
                "busy_share": float(np.mean([run.row["busy_share"] for run in found])),
            }
            for (pool, short, name), found in zip(about, runs, strict=True)
        ]
        return _with_gains(rows)

    def _too_small(self, item: Settled) -> int | None:
        smaller = [size for size in item.runs if item.num_gpus and size < item.num_gpus]
        return max(smaller, default=None)

    def _few_seeds(self) -> tuple[int, ...]:
        return self.seeds[: max(1, min(len(self.seeds), self.config.sensitivity.num_seeds))]

    def _sensitivity(self, option: Option) -> list[Row]:
        """Each assumption moved down and up by itself; the fleet is searched for again, on the
        same draws."""
        if self.config.sensitivity.num_seeds < 1:
            return []
        rows = [*self._price_rows(option), *self._moved_rows(option)]
        base = self._cost_of_seeds(option, self._few_seeds())
        for row in rows:
            row["base_usd_per_month"] = base
            known = row["usd_per_month"] is not None
            row["change"] = row["usd_per_month"] / base - 1 if known else None
        return rows

    def _cost_of_seeds(self, option: Option, seeds: Sequence[int]) -> float:
        return float(np.mean(self._costs_per_seed(option)[: len(seeds)]))

    def _price_rows(self, option: Option) -> Iterable[Row]:
        price = self.prices[option.device]
        base = self._cost_of_seeds(option, self._few_seeds())
        for side, usd in (("low", price.low), ("high", price.high)):
            yield {
                **option._asdict(),
                "assumption": "price",
                "side": side,
                "moved_to": usd / price.usd_per_gpu_hour,
                "num_gpus": self.outcomes[option].num_gpus,
                "usd_per_month": base * usd / price.usd_per_gpu_hour,
                "served_share_of_answer": self._answer_share(option),
            }

    def _answer_share(self, option: Option) -> float:
        return pooled_share([run for of_model in self.outcomes[option].runs() for run in of_model])

    def _moved_rows(self, option: Option) -> Iterable[Row]:
        seeds, moves = self._few_seeds(), self._moves(option)
        outcome = self.outcomes[option]
        searches, fixed = [], []
        for _, _, variant in moves:
            for model, item in outcome.settled.items():
                pool = Pool(*option, model)
                guess = item.num_gpus or 1
                searches += [Search(Case(pool, seed, variant), guess) for seed in seeds]
                fixed.append(Alternative(pool, seeds, guess, variant))
        found = iter(self.crew.do("sensitivity: fleets", searches))
        served = iter(self.crew.do("sensitivity: service", fixed))
        usd = self.prices[option.device].usd_per_gpu_hour * self.config.hours_per_month
        for name, side, variant in moves:
            sizes = [[next(found).num_gpus for _ in seeds] for _ in outcome.settled]
            runs = [run for _ in outcome.settled for run in next(served)]
            known = all(size is not None for of_model in sizes for size in of_model)
            num_gpus = sum(float(np.mean(of_model)) for of_model in sizes) if known else None
            yield {
                **option._asdict(),
                "assumption": name,
                "side": side,
                "moved_to": getattr(variant, name),
                "num_gpus": num_gpus,
                "usd_per_month": None if num_gpus is None else num_gpus * usd,
                "served_share_of_answer": pooled_share(runs),
            }

    def _moves(self, option: Option) -> list[tuple[str, str, Variant]]:
        given = self.config.sensitivity
        times = given.times
        if times is None:
            cases = [as_asked(Pool(*option, model), self.seeds[0]) for model in self.models]
            found = self.crew.do("cost model's interval", [RelativeError(case) for case in cases])
            times = min(0.9, max(found))
        changes = {"load": given.load, "lengths": given.lengths, "times": times}
        return [
            (name, side, AS_ASKED._replace(**{name: 1 + sign * change}))
            for name, change in changes.items()
            for side, sign in (("low", -1), ("high", 1))
            if change > 0
        ]


def pooled_service(runs: Sequence[Sequence[Run]], level: ServiceLevel) -> Row:
    """Over the tasks of all base models and draws."""
    times = [run.times for of_model in runs for run in of_model]
    joined = Times(
        *(np.concatenate([getattr(item, name) for item in times]) for name in Times._fields[:-1]),
        tenants=tuple(name for item in times for name in item.tenants),
    )
    return service_row(joined, level)


def _with_gains(rows: list[Row]) -> list[Row]:
    """``gain``: of the served share; ``limits``: the relaxation that gains most, of those that let
    the fleet keep up with its work."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["device"], row["model"]), []).append(row)
    for group in groups.values():
        base = next(row["served_share"] for row in group if row["relaxed"] == AS_IT_IS)
        for row in group:
            row["gain"] = row["served_share"] - base
        # A fleet that serves all but cannot keep up is helped by what makes it less busy.
        most = max(
            group, key=lambda row: (row["busy_share"] <= 1.0, row["gain"], -row["busy_share"])
        )
        for row in group:
            row["limits"] = row is most and row["relaxed"] != AS_IT_IS
    return rows

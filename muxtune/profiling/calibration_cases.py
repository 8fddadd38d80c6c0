"""The few whole steps that a profile keeps, to calibrate how operations add up to a step."""

from __future__ import annotations

from itertools import pairwise

from muxtune.cost.shapes import ModelShape
from muxtune.profiling.step_cases import StepCase, StepTask, mean_tokens

_MIX = ("sst2", "openbookqa", "rte", "gsm8k")


SHALLOW_LAYERS = 4
_FILLED = 0.7


def shallow(shape: ModelShape) -> ModelShape | None:
    """A few blocks of a deep model: what a pass takes besides its blocks shows there."""
    if shape.num_layers <= 2 * SHALLOW_LAYERS:
        return None
    return shape._replace(num_layers=SHALLOW_LAYERS)


def shallow_cases(shape: ModelShape, max_rows: int) -> list[StepCase]:
    """Of ``shallow``'s model: a few of ``calibration_cases``, of many rows and of few in turn: what
    a pass takes however small it is shows in these."""
    cases = calibration_cases(shape, max_rows)
    small = calibration_cases(shape, max_rows // 4)
    chosen = [cases[1], small[0], cases[3], small[3], cases[6], small[2]]
    return [
        case._replace(name=f"{case.name}, few blocks {number}")
        for number, case in enumerate(chosen)
    ]


def calibration_cases(shape: ModelShape, max_rows: int) -> list[StepCase]:
    """From few rows to ``max_rows``, from one task to sixteen; the most telling come first, for a
    budget may end early. The same for every model and device but for the number of rows."""

    def tasks(count: int, ranks: tuple[int, ...], **changes: object) -> tuple[StepTask, ...]:
        return tuple(
            StepTask(rank=ranks[i % len(ranks)], histogram=_MIX[i % 4], batch_size=4)._replace(
                **changes
            )
            for i in range(count)
        )

    def case(name: str, members: tuple[StepTask, ...], rows: int, groups: int = 1) -> StepCase:
        ends = [len(members) * group // groups for group in range(groups + 1)]
        split = tuple(tuple(range(*pair)) for pair in pairwise(ends))
        # A micro-batch holds the longest sequence of each of its tasks.
        rows = max(rows, 128)
        longest = max(32, rows // max(map(len, split)) // 32 * 32)
        share = rows // max(map(len, split))
        fitting = tuple(
            _filling(task, min(task.max_length_tokens, longest), share) for task in members
        )
        return StepCase(f"calibration {name}", shape, fitting, split, min(64, longest), rows)

    attention_only = ("q_proj", "v_proj")
    return [
        case("one task", tasks(1, (16,)), max_rows // 4),
        case("eight tasks", tasks(8, (16,)), max_rows),
        case("mixed ranks", tasks(6, (8, 64, 16, 32)), max_rows // 2),
        case("two htasks", tasks(8, (16, 32)), max_rows // 2, groups=2),
        case("few rows", tasks(2, (8,), batch_size=2, max_length_tokens=128), max_rows // 16),
        case("queries and values", tasks(4, (16,), targets=attention_only), max_rows // 2),
        case("long", tasks(2, (64,), max_length_tokens=512, histogram="code_alpaca_2k"), max_rows),
        case("sixteen tasks", tasks(16, (8, 16), batch_size=2), max_rows),
        case("prefixes", (*tasks(2, (16,)), *tasks(1, (16,), method="prefix")), max_rows // 2),
        case("ia3", (*tasks(2, (16,)), *tasks(1, (8,), method="ia3")), max_rows // 2),
    ]


def _filling(task: StepTask, longest: int, share_rows: int) -> StepTask:
    """With as many sequences a step as its share of a micro-batch mostly holds: rows of filler are
    all alike, and a GPU computes with them at less power, so faster than it ever trains."""
    count = max(1, int(_FILLED * share_rows / mean_tokens(task.histogram, longest)))
    return task._replace(max_length_tokens=longest, batch_size=count)

"""The whole captured steps that a profile keeps, to calibrate how operations add up to a step.

Fixed tables, the same for every model and device but for the number of rows. Most steps are of a
few blocks of the model (``calibration_cases.shallow``), which take a fraction of a second; some of
these run on the whole model too, so that what a pass takes once is told from what every block
takes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from muxtune.cost.shapes import ModelShape
from muxtune.profiling.calibration_cases import SHALLOW_LAYERS, shallow
from muxtune.profiling.step_cases import StepCase, StepTask, mean_tokens

_MIX = ("sst2", "openbookqa", "rte", "gsm8k")
_SHORT, _LONG, _OTHER = ("sst2",), ("code_alpaca_2k", "gsm8k"), ("openbookqa", "rte")
_ATTENTION = ("q_proj", "v_proj")
_METHODS = ("prefix", "ia3", "bottleneck", "lora")
_FILLED, _HALF = 0.85, 0.45
_LEAST_ROWS, _MOST_ROWS = 128, 4096


class _Step(NamedTuple):
    """``slots`` tasks in each of ``groups`` hTasks of ``rows`` rows. ``ranks``, ``lengths`` (names
    of histograms), ``targets`` and ``methods``: of the tasks, in turn. ``filled``: of the rows;
    three passes are that full, or one of ``_HALF``, as of a task whose steps fit one pass."""

    slots: int
    rows: int
    ranks: tuple[int, ...] = (16,)
    filled: float = _FILLED
    lengths: tuple[str, ...] = _MIX
    targets: tuple[tuple[str, ...], ...] = ((),)
    groups: int = 1
    methods: tuple[str, ...] = ("lora",)


# The most telling first, for a budget may end early; then what lies between, and what is rarer.
_FEW_BLOCKS = (
    _Step(1, 512), _Step(4, 1024), _Step(12, 3072), _Step(4, 256, (64,)), _Step(1, 2048, (64,)),
    _Step(32, 2048), _Step(4, 4096), _Step(4, 2048, (16, 64)), _Step(1, 128, (64,)),
    _Step(4, 1024, (64,)), _Step(4, 1024, filled=_HALF), _Step(4, 2048, targets=(_ATTENTION,)),
    _Step(12, 768, (64,)), _Step(1, 2048, filled=_HALF), _Step(1, 1024), _Step(4, 512),
    _Step(12, 1536, (16, 64)), _Step(1, 128), _Step(1, 4096, (64,)), _Step(32, 1024, (64,)),
    _Step(4, 4096, (64,), filled=_HALF), _Step(1, 512, (64,)), _Step(12, 3072, (64,), filled=_HALF),
    _Step(32, 4096), _Step(2, 1024, groups=3), _Step(4, 2048, lengths=_LONG),
    _Step(4, 1024, lengths=_SHORT), _Step(2, 1024, methods=("prefix", "lora")),
    _Step(2, 1024, methods=("ia3", "lora")), _Step(2, 1024, methods=("bottleneck", "lora")),
    _Step(1, 512, lengths=_OTHER, methods=("prefix",)), _Step(4, 512, methods=_METHODS),
    _Step(2, 384, lengths=_OTHER, methods=("bottleneck", "prefix")),
    _Step(1, 512, lengths=_OTHER, methods=("ia3",)), _Step(4, 2048, methods=_METHODS),
    _Step(1, 768, lengths=_OTHER, methods=("bottleneck",)), _Step(12, 1536, methods=_METHODS),
    _Step(1, 1536, lengths=_OTHER, filled=_HALF, methods=("prefix",)),
    _Step(8, 1536, (64,)), _Step(1, 1536), _Step(8, 2048, (16, 64)), _Step(4, 1536, (16, 64)),
    _Step(8, 3072, (64, 16), filled=_HALF), _Step(4, 1024, (16, 64), groups=2),
    _Step(6, 1024, (64,)), _Step(6, 4096, (16, 64), filled=_HALF),
    _Step(12, 384), _Step(4, 3072, (16, 32)), _Step(1, 256), _Step(4, 128), _Step(12, 1536),
    _Step(4, 512, (64,)), _Step(1, 3072, filled=_HALF), _Step(4, 3072, (64,), filled=_HALF),
    _Step(1, 512, targets=(_ATTENTION,)), _Step(12, 3072, (16, 64), targets=(_ATTENTION, ())),
    _Step(1, 2048), _Step(4, 2048, (64,)), _Step(12, 768, filled=_HALF), _Step(32, 2048, (16, 64)),
    _Step(1, 1024, (64,), filled=_HALF), _Step(12, 1536, (64,), filled=_HALF),
    _Step(4, 3072, lengths=_SHORT), _Step(1, 4096, lengths=_LONG),
    _Step(4, 4096, (16, 64), lengths=_LONG), _Step(2, 3072, methods=("prefix", "lora")),
    _Step(2, 3072, methods=("ia3", "lora")), _Step(2, 3072, methods=("bottleneck", "lora")),
    _Step(12, 384, (64,)), _Step(4, 256, filled=_HALF), _Step(4, 512, targets=(_ATTENTION, ())),
    _Step(1, 256, (64,), filled=_HALF), _Step(32, 4096, (64,), filled=_HALF),
    _Step(4, 512, (32,), filled=_HALF), _Step(4, 2048, (32,), filled=_HALF),
    _Step(12, 1536, (32,), filled=_HALF), _Step(1, 1024, (32,), filled=_HALF),
    _Step(1, 4096, filled=_HALF), _Step(32, 2048, filled=_HALF), _Step(1, 512, filled=_HALF),
    _Step(4, 512, (64,), filled=_HALF), _Step(12, 384, filled=_HALF),
)  # fmt: skip
_WHOLE = (
    _Step(4, 1024), _Step(1, 128, (64,)), _Step(12, 3072, (16, 64)), _Step(1, 512),
    _Step(4, 4096), _Step(4, 256, (64,)), _Step(32, 2048), _Step(1, 2048, (64,)),
    _Step(4, 2048, targets=(_ATTENTION,)), _Step(2, 1024, groups=3),
)  # fmt: skip


def few_block_cases(shape: ModelShape, max_rows: int) -> list[StepCase]:
    """Of ``shallow``'s model."""
    return _cases(shape, _FEW_BLOCKS, max_rows, f"{SHALLOW_LAYERS} blocks")


def whole_cases(shape: ModelShape, max_rows: int) -> list[StepCase]:
    """Of a whole model; all of them of one that has so few blocks that there is no other."""
    deep = shallow(shape) is not None
    return _cases(shape, _WHOLE if deep else _FEW_BLOCKS, max_rows, "")


def _cases(shape: ModelShape, steps: tuple[_Step, ...], max_rows: int, note: str) -> list[StepCase]:
    """Where fewer rows are wanted, each has as many fewer, down to the least; none comes twice."""
    found: dict[str, StepCase] = {}
    for step in steps:
        scale = max(1, _MOST_ROWS // max_rows)
        rows = max(min(step.rows, _LEAST_ROWS), step.rows // scale)
        case = _case(shape, step._replace(rows=rows), note)
        found.setdefault(case.name, case)
    return list(found.values())


def _case(shape: ModelShape, step: _Step, note: str) -> StepCase:
    """With as many sequences a step as their share of a micro-batch mostly holds: rows of filler
    are all alike, and a GPU computes with them at less power, so faster than it ever trains."""
    share = max(16, step.rows // step.slots)
    chunk = next(size for size in (64, 32, 16) if share % size == 0 or size == 16)
    tasks = tuple(_task(step, number, share) for number in range(step.slots * step.groups))
    ends = [step.slots * group for group in range(step.groups + 1)]
    split = tuple(tuple(range(*pair)) for pair in pairwise(ends))
    parts = [f"{step.slots} of {step.rows} rows", "+".join(map(str, step.ranks))]
    parts += [f"{step.groups} htasks"] if step.groups > 1 else []
    parts += ["+".join(step.methods)] if step.methods[0] != "lora" else []
    parts += ["half filled"] if step.filled < _FILLED else []
    parts += ["queries and values"] if step.targets[0] else []
    parts += ["long"] if step.lengths == _LONG else ["short"] if step.lengths == _SHORT else []
    parts += [note] if note else []
    name = f"calibration {', '.join(parts)}"
    return StepCase(name, shape, tasks, split, chunk, share // chunk * chunk * step.slots)


def _task(step: _Step, number: int, share_rows: int) -> StepTask:
    method = step.methods[number % len(step.methods)]
    rank = step.ranks[number % len(step.ranks)] if method != "ia3" else 1
    lengths = step.lengths[number % len(step.lengths)]
    longest = min(256 if step.lengths != _LONG else 1024, share_rows)
    passes = 3 if step.filled > _HALF else 1
    count = max(1, round(passes * step.filled * share_rows / mean_tokens(lengths, longest)))
    targets = step.targets[number % len(step.targets)] if method == "lora" else ()
    return StepTask(method, rank, lengths, longest, count, 0.0, targets)

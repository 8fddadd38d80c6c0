"""Why a plan is as it is, in plain words with figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from muxtune.planners.explanation import Alternative, Fusion
from muxtune.report.tables import format_bytes, format_seconds
from muxtune.types import Plan

SHOWN_APART = 3  # pairs of hTasks that come closest to being one
NEARLY, EQUAL = 5e-3, 5e-4


class Why(NamedTuple):
    """What the words are made of. ``tokens``: effective ones in a step of every task.
    ``saturation_tokens``: of a pass; ``pass_tokens``: of each hTask's largest."""

    plan: Plan
    tokens: float
    saturation_tokens: int
    pass_tokens: tuple[int, ...]
    memory_limit_bytes: int
    fusions: Sequence[Fusion]
    alternatives: Sequence[Alternative]
    unpromised: Alternative | None


def why_lines(why: Why) -> list[str]:
    """The plan and the saturation point; what fusing or keeping apart gains; what memory and
    promises forbid; the runner-up."""
    plan = why.plan
    lines = [plan.reason or "the planner gave no reason", _saturation(why)]
    fused = [item for item in why.fusions if not item.apart]
    apart = [item for item in why.fusions if item.apart and item.step_time_s]
    lines += [line for item in fused if (line := _fused(why, item))]
    lines += [_apart(why, item) for item in sorted(apart, key=lambda f: f.slower)[:SHOWN_APART]]
    lines += [*_memory(why), *_promises(why), *_runner_up(why)]
    return lines


def _saturation(why: Why) -> str:
    sizes = [
        f"{tokens:,} ({'below' if tokens < why.saturation_tokens else 'at or above'})"
        for tokens in why.pass_tokens
    ]
    noun = "the hTask's largest pass computes" if len(sizes) == 1 else "the largest passes compute"
    return (
        f"saturation: longer passes compute more tokens a second up to about "
        f"{why.saturation_tokens:,} tokens a pass; {noun} {', '.join(sizes)}"
    )


def _difference(why: Why, step_s: float) -> str:
    """How much worse another time for a step of every task is."""
    now_s = why.plan.predicted.tasks_step_time_s
    slower, tokens = step_s - now_s, why.tokens / now_s - why.tokens / step_s
    words = ("slower", "fewer") if slower >= 0 else ("faster", "more")
    return (
        f"{format_seconds(step_s)}, {format_seconds(abs(slower))} ({abs(slower) / now_s:.1%}) "
        f"{words[0]} and {abs(tokens):,.0f} {words[1]} effective tokens/s"
    )


def _fused(why: Why, item: Fusion) -> str:
    names = ", ".join(item.task_ids[0])
    if item.step_time_s is None:
        return f"fused: {names}: an hTask each does not fit into memory"
    return (
        f"fused: {names}: they share the launches and weights of each pass; in an hTask each, a "
        f"step of every task would take {_difference(why, item.step_time_s)}"
    )


def _apart(why: Why, item: Fusion) -> str:
    sets, several = [", ".join(names) for names in item.task_ids], why.plan.replicas[0].num_gpus > 1
    reason = (
        "the one computes while the other communicates or waits"
        if several
        else ("together they would compute more filler than they save, or are past saturation")
    )
    assert item.step_time_s is not None
    return (
        f"kept apart: {sets[0]} | {sets[1]}: {reason}; in one hTask a step of every task would "
        f"take {_difference(why, item.step_time_s)}"
    )


def _memory(why: Why) -> Iterator[str]:
    peak, limit = why.plan.predicted.peak_memory_bytes.value, why.memory_limit_bytes
    forbidden = [item for item in why.fusions if item.apart and item.step_time_s is None]
    for item in forbidden[:SHOWN_APART]:
        sets = [", ".join(names) for names in item.task_ids]
        yield f"memory forbids: {sets[0]} | {sets[1]} in one hTask"
    left = f"{format_bytes(max(0, int(limit - peak)))} of {format_bytes(limit)}"
    yield f"memory: this plan leaves {left} a GPU free at its peak"


def _promises(why: Why) -> Iterator[str]:
    if why.unpromised is not None and why.unpromised.slower < -NEARLY:
        told = _difference(why, why.unpromised.step_time_s)
        yield f"promises forbid: without any max_slowdown a step of every task would take {told}"


def _runner_up(why: Why) -> Iterator[str]:
    others = [item for item in why.alternatives if abs(item.slower) > EQUAL]
    if others:
        best = others[0]
        yield f"runner-up: {best.name}: {_difference(why, best.step_time_s)}"

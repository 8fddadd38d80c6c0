"""Operator-level co-scheduling: the problem of a round, orders for it, their player, their cost.

``ordered`` gives a plan its order. Below it: ``round_problem`` lays a plan and its subgraph times
out; ``periodic_template`` finds an order; ``play`` and ``play_contended`` play it;
``bubble_account`` and ``round_bounds`` say where the time goes and how far from the bound it is.
"""

from muxtune.planning.orchestration.accounting import (
    BubbleAccount,
    RoundBounds,
    bound_ratio,
    bubble_account,
    communication_shares,
    compute_work_ns,
    contended_bound_ns,
    round_bounds,
    utilisation,
)
from muxtune.planning.orchestration.baselines import lorapp, one_f_one_b
from muxtune.planning.orchestration.contention import (
    NO_CONTENTION,
    Contention,
    play_contended,
)
from muxtune.planning.orchestration.dispatch import DispatchOptions, dispatch
from muxtune.planning.orchestration.orchestrate import InFlightLimits, ordered, pipeline_limits
from muxtune.planning.orchestration.pace import ONE_GPU, Pace, pace_of, played, round_time_s
from muxtune.planning.orchestration.player import Timeline, checked_sequences, play
from muxtune.planning.orchestration.problem import RoundGraph, RoundProblem, round_problem
from muxtune.planning.orchestration.spans import ScheduleSpan, schedule_spans
from muxtune.planning.orchestration.template import Template, TemplateOptions, periodic_template

__all__ = [
    "NO_CONTENTION",
    "ONE_GPU",
    "BubbleAccount",
    "Contention",
    "DispatchOptions",
    "InFlightLimits",
    "Pace",
    "RoundBounds",
    "RoundGraph",
    "RoundProblem",
    "ScheduleSpan",
    "Template",
    "TemplateOptions",
    "Timeline",
    "bound_ratio",
    "bubble_account",
    "checked_sequences",
    "communication_shares",
    "compute_work_ns",
    "contended_bound_ns",
    "dispatch",
    "lorapp",
    "one_f_one_b",
    "ordered",
    "pace_of",
    "periodic_template",
    "pipeline_limits",
    "play",
    "play_contended",
    "played",
    "round_bounds",
    "round_problem",
    "round_time_s",
    "schedule_spans",
    "utilisation",
]

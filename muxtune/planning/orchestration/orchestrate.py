"""From a plan to the same plan with an order: what a planner calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.planning.orchestration.contention import NO_CONTENTION, Contention
from muxtune.planning.orchestration.problem import round_problem
from muxtune.planning.orchestration.template import Template, TemplateOptions, periodic_template
from muxtune.types import Plan, RankStream, SubgraphRef, SubgraphTimes


class InFlightLimits(NamedTuple):
    """Memory of one replica's stages; both empty: unlimited. See ``RoundProblem``."""

    activation_units: tuple[tuple[int, ...], ...] = ()
    capacity_units: tuple[int, ...] = ()


def pipeline_limits(
    activation_bytes: Sequence[Sequence[int]], num_stages: int, spare: float = 0.0
) -> InFlightLimits:
    """Stage s of S may hold S - s of the largest micro-batch, as 1F1B does, and ``spare`` more.

    ``activation_bytes[htask][stage]``. Smaller micro-batches count with their own bytes, so more
    of them fit. Tensor parallelism without stages needs ``spare`` 1: two micro-batches overlap.
    """
    units = tuple(tuple(row) for row in activation_bytes)
    capacity = tuple(
        int((num_stages - stage + spare) * max(row[stage] for row in units))
        for stage in range(num_stages)
    )
    return InFlightLimits(units, capacity)


_DEFAULTS = TemplateOptions()


def ordered(
    plan: Plan,
    times: Sequence[SubgraphTimes],
    limits: Sequence[InFlightLimits] = (),
    options: TemplateOptions = _DEFAULTS,
    contention: Contention = NO_CONTENTION,
) -> tuple[Plan, tuple[Template, ...]]:
    """The plan with an order for every replica, and each replica's template.

    ``times`` and ``limits``: one per replica. Raises ConfigError for uncounted turns and for
    limits that nothing fits.
    """
    if len(times) != len(plan.replicas) or len(limits) not in (0, len(times)):
        raise ConfigError("times", "do not match plan.replicas", "give one per replica")
    order: dict[RankStream, tuple[SubgraphRef, ...]] = {}
    templates: list[Template] = []
    for replica in range(len(plan.replicas)):
        problem = round_problem(plan, times[replica], replica)
        if limits:
            problem = problem._replace(**limits[replica]._asdict())
        template = periodic_template(problem, options, contention, replica)
        order.update(template.order)
        templates.append(template)
    return plan._replace(order=order), tuple(templates)

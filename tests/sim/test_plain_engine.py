"""The engine and the simulated executor against ``plain_engine``: the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.cost.book import CostBook
from muxtune.deciding import EngineOptions
from muxtune.engine import Engine
from muxtune.planning.step_builder import StepBuilder
from muxtune.registry import CLUSTER_POLICIES, PLANNERS
from muxtune.types import (
    AdapterSpec,
    DataSpec,
    Drain,
    Event,
    EventKind,
    InstanceSpec,
    Place,
    TaskSpec,
)
from muxtune.workload.synthetic import SyntheticLibrary
from muxtune_sim import SimExecutor, SimOptions
from tests.sim.fakes import (
    Collector,
    FakeLibrary,
    FakePlanner,
    MemoryJournal,
    fake_book,
    instance,
    task,
)
from tests.sim.plain_engine import NO_FAILURES, PlainEngine

OPTIONS = EngineOptions(tell_waits=False)


class Draining:
    """FIFO that also lets every ``every``-th running task it looks at leave."""

    def __init__(self, every: int, cap: int) -> None:
        self.inner = CLUSTER_POLICIES.get("fifo_shared")(max_tasks_per_instance=cap)
        self.every, self.asked = every, 0

    def on_event(self, event: Event, fleet: Any) -> list[Any]:
        actions = self.inner.on_event(event, fleet)
        self.asked += 1
        if not self.every or self.asked % self.every or self.asked > 120:
            return actions
        touched = {action.instance_id for action in actions if isinstance(action, Place)}
        for view in sorted(fleet.instances.values()):
            free = [t.task_id for t in view.tasks if t.task_id not in view.draining]
            if free and view.instance_id not in touched:
                return [*actions, Drain(free[self.asked % len(free)])]
        return actions


def compared(
    policy: Any,
    planner: Any,
    costs: Any,
    library: Any,
    tasks: list[TaskSpec],
    instances: list[InstanceSpec],
    fail_at_ns: Mapping[str, int] = NO_FAILURES,
) -> tuple[MemoryJournal, PlainEngine, Collector]:
    """Factories, because each engine needs parts of its own."""
    journal, told = MemoryJournal(), Collector()
    options = SimOptions(fail_instance_at_ns=fail_at_ns)
    executor = SimExecutor(StepBuilder(), costs(), library(), options)
    Engine(policy(), planner(), executor, tasks, instances, journal, (told,), OPTIONS).run()
    plain = PlainEngine(policy(), planner(), costs(), library(), tasks, instances, fail_at_ns)
    plain.run()
    return journal, plain, told


def check_same(journal: MemoryJournal, plain: PlainEngine, told: Collector) -> None:
    for number, (line, other) in enumerate(zip(journal.lines, plain.lines, strict=False)):
        assert line == other, f"batch {number}"
    assert journal.lines == plain.lines
    results = [
        (o.task_id, f"TASK_{o.state.name}", o.arrival_ns, o.ended_ns, o.steps)
        for o in told.outcomes
    ]
    assert results == plain.ended


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 25), st.integers(1, 3)), min_size=1, max_size=10),
    gaps=st.lists(st.integers(0, 9), min_size=10, max_size=10),
    cancels=st.lists(st.one_of(st.none(), st.integers(0, 60)), min_size=10, max_size=10),
    every=st.sampled_from([0, 3, 7]),
    cap=st.integers(1, 4),
    fails_s=st.one_of(st.none(), st.integers(1, 60)),
    transition_s=st.sampled_from([0.0, 2.5]),
)
def test_random_runs_give_the_same_bytes(lengths, gaps, cancels, every, cap, fails_s, transition_s):
    tasks = [
        task(
            f"t{n}", steps, sum(gaps[: n + 1]) / 2, batch_size,
            cancel_ns=None if cancels[n] is None else cancels[n] * 500_000_000,
        )
        for n, (steps, batch_size) in enumerate(lengths)
    ]  # fmt: skip
    check_same(
        *compared(
            lambda: Draining(every, cap),
            lambda: FakePlanner(error=100.0),
            lambda: fake_book(transition_s=transition_s),
            FakeLibrary,
            tasks,
            [instance("i0"), instance("i1")],
            {} if fails_s is None else {"i1": fails_s * 700_000_000},
        )
    )


def test_real_planners_costs_and_lengths_give_the_same_bytes():
    names = ("sst2", "rte", "openbookqa")
    tasks = [
        TaskSpec(
            f"t{n:02}",
            "llama-2-7b",
            adapter=AdapterSpec(rank=(8, 16)[n % 2]),
            data=DataSpec(histogram=names[n % 3], max_length_tokens=128),
            batch_size=(4, 8)[n % 2],
            num_steps=5 + 3 * n,
            arrival_ns=n * 700_000_000,
        )
        for n in range(10)
    ]
    specs = [
        InstanceSpec(f"i{n}", "llama-2-7b", "h100-sxm", 72 * 10**9, gpu_ids=(f"g{n}",))
        for n in range(2)
    ]
    for name, cap in (("muxtune", 4), ("batched", 3), ("exclusive", 1)):
        costs = CostBook()
        found = compared(
            lambda cap=cap: Draining(11, cap),
            lambda name=name, costs=costs: PLANNERS.get(name)(costs=costs),
            lambda costs=costs: costs,
            lambda: SyntheticLibrary(seed=1),
            tasks,
            specs,
        )
        check_same(*found)
        assert found[2].events(EventKind.TASK_RELEASED)  # moves are compared, too

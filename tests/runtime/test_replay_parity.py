"""A real run with arrivals, a cancel and a failure in its middle replays to the same plans."""

from __future__ import annotations

import pytest

from muxtune.build import CostBook
from muxtune.cluster_policies.fifo_shared import FifoShared
from muxtune.engine import Engine, replay
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.planning.journal import Journal, JournalBatch, read_journal
from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.executor import TorchExecutor
from muxtune.runtime.options import TorchOptions
from muxtune.types import EventKind, InstanceSpec, TaskReadyData, TaskSpec
from tests.runtime.runtime_helpers import TINY, DrawnText, make_task

SECOND_NS = 1_000_000_000
INSTANCE = InstanceSpec("gpu0", "tiny", "cpu", 8_000_000_000)
BOOK = CostBook(models={"tiny": TINY})


class Ticks:
    """A clock that moves a millisecond whenever it is read, however fast the machine is."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += 1_000_000
        return self.now_ns


def planner_and_policy() -> tuple[MuxTunePlanner, FifoShared]:
    return MuxTunePlanner(BOOK), FifoShared()


def fails_in_the_middle(library: DrawnText) -> None:
    def check(task_id: str, step: int) -> None:
        if task_id == "broken" and step >= 6:
            raise ValueError("the tenant's storage went away")

    library.on_batch = check


@pytest.fixture(scope="module")
def batches(
    store: BackboneStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JournalBatch, ...]:
    """The journal of one real run: two tasks at the start, three that arrive while those train."""
    folder = tmp_path_factory.mktemp("run")
    arrivals_s = {"first": 0.0, "cancelled": 0.0, "second": 0.4, "broken": 0.6, "late": 0.9}
    steps = {"first": 150, "cancelled": 100_000, "second": 40, "broken": 60, "late": 30}
    tasks: list[TaskSpec] = [
        make_task(
            name,
            num_steps=steps[name],
            rank=2 + 2 * index,
            arrival_ns=int(at_s * SECOND_NS),
            cancel_ns=int(1.5 * SECOND_NS) if name == "cancelled" else None,
        )
        for index, (name, at_s) in enumerate(arrivals_s.items())
    ]
    library = DrawnText()
    fails_in_the_middle(library)
    options = TorchOptions(output_dir=folder, evaluate_tokens=0)
    executor = TorchExecutor(StepBuilder(), store, library, options, clock_ns=Ticks())
    planner, policy = planner_and_policy()
    with Journal(folder / "journal.jsonl", {}, {}) as journal:
        totals = Engine(policy, planner, executor, tasks, [INSTANCE], journal).run()
    executor.close()
    assert (totals.num_done, totals.num_failed, totals.num_cancelled) == (3, 1, 1)
    return read_journal(folder / "journal.jsonl").batches


def test_the_run_had_what_a_replay_must_survive(batches: tuple[JournalBatch, ...]):
    events = [event for batch in batches for event in batch.events]
    applied = [event.time_ns for event in events if event.kind is EventKind.PLAN_APPLIED]
    arrivals = [event.time_ns for event in events if event.kind is EventKind.TASK_ARRIVED]
    assert sum(time_ns > applied[0] for time_ns in arrivals) >= 3, "arrivals while it trained"
    kinds = {event.kind for event in events}
    assert {EventKind.TASK_CANCELLED, EventKind.TASK_FAILED} <= kinds
    plans = [plan for batch in batches for plan in batch.plans if plan.htasks]
    assert len(plans) >= 6, "the first plan and five changes"


def test_recorded_events_give_the_same_plans(batches: tuple[JournalBatch, ...]):
    planner, policy = planner_and_policy()
    assert replay(batches, policy, planner) == []


def altered(batches: tuple[JournalBatch, ...], name: str) -> list[JournalBatch]:
    """One event changed: the lengths that a task reported when it was ready."""
    changed = []
    for batch in batches:
        events = []
        for event in batch.events:
            if event.kind is EventKind.TASK_READY and event.task_id == name:
                data = event.data
                assert isinstance(data, TaskReadyData)
                lengths = data.lengths._replace(
                    max_tokens=48, quantiles_tokens=(2, 48), mean_tokens=30.0, content_hash="other"
                )
                event = event._replace(data=data._replace(lengths=lengths))
            events.append(event)
        changed.append(batch._replace(events=tuple(events)))
    return changed


def test_one_altered_event_gives_other_plans(batches: tuple[JournalBatch, ...]):
    planner, policy = planner_and_policy()
    differences = replay(altered(batches, "second"), policy, planner)
    assert any(difference.part == "plans" for difference in differences)


def test_a_task_that_never_failed_gives_other_plans(batches: tuple[JournalBatch, ...]):
    kept = [
        batch._replace(events=tuple(e for e in batch.events if e.kind is not EventKind.TASK_FAILED))
        for batch in batches
    ]
    planner, policy = planner_and_policy()
    assert replay(kept, policy, planner) != []

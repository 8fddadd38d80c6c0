"""Replay, fold and resume of a journalled run."""

from __future__ import annotations

from typing import Any

import pytest

from muxtune.deciding import Decider
from muxtune.engine import DEFAULT_OPTIONS, redecide, replay
from muxtune.errors import MuxTuneError
from muxtune.planning.journal import Journal, read_journal
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import AdapterSpec, EventKind, ResultData, TaskState
from muxtune_sim import SimOptions
from tests.sim.fakes import FakePlanner, Run, instance, seconds, task

OPTIONS = SimOptions(fail_task_at_ns={"t3": seconds(5)}, planning_base_s=0.25)


def policy() -> Any:
    return CLUSTER_POLICIES.get("fifo_shared")(max_tasks_per_instance=3)


def planner() -> FakePlanner:
    return FakePlanner({64: 20, 32: 7})


def busy_run(**fields: Any) -> Run:
    """Arrivals in mid-round, a withdrawal, a failure, refusals, several tasks at one instant."""
    ranks = [16, 32, 16, 16, 64, 32, 16, 16]
    tasks = [
        task(
            f"t{index}",
            steps=4 + index % 3 * 5,
            arrival_s=1.3 * (index // 2),
            batch_size=1 + index % 2,
            adapter=AdapterSpec(rank=rank),
            cancel_ns=seconds(9.6) if index == 2 else None,
        )
        for index, rank in enumerate(ranks)
    ]
    instances = [instance("i0", 8), instance("i1", 8)]
    return Run(policy(), tasks, instances, planner(), OPTIONS, transition_s=0.1, **fields)


def test_replay_gives_the_same_decisions():
    run = busy_run()
    totals = run.run()
    assert totals.num_plans >= 5 and totals.num_placements_refused >= 1
    assert totals.num_failed == 1 and totals.num_cancelled == 1 and totals.num_refused == 1
    assert replay(run.journal.batches, policy(), planner()) == []


def test_replay_tells_an_altered_event():
    run = busy_run()
    run.run()
    batches = run.journal.batches
    at = next(i for i, b in enumerate(batches) if b.plans and b.plans[0].epoch == 2)
    event = batches[at].events[-1]
    other = event._replace(kind=EventKind.WAKE, task_id="", data=None)
    batches[at] = batches[at]._replace(events=(*batches[at].events[:-1], other))
    differences = replay(batches, policy(), planner())
    assert differences and differences[0].batch == at
    assert {difference.part for difference in differences} & {"plans", "actions", "error"}


def test_replay_tells_another_planner():
    run = busy_run()
    run.run()
    differences = replay(run.journal.batches, policy(), FakePlanner({64: 20, 32: 6}))
    assert differences and differences[0].part in {"plans", "refusals", "actions"}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    contents = []
    for name in ("first", "second"):
        run = busy_run()
        with Journal(tmp_path / name, fsync=False) as journal:
            run.engine.journal = journal
            run.run()
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1] and len(contents[0]) > 10_000
    assert replay(read_journal(tmp_path / "first").batches, policy(), planner()) == []


def test_a_part_of_the_journal_gives_the_state():
    run = busy_run()
    run.run()
    batches = run.journal.batches
    middle = next(i for i, b in enumerate(batches) if b.time_ns >= seconds(6))
    decider = Decider(policy(), planner(), DEFAULT_OPTIONS)
    for record in batches[:middle]:
        redecide(decider, record)
    fleet = decider.fleet
    told = {e.task_id for b in batches[:middle] for e in b.events if e.kind == EventKind.TASK_DONE}
    assert told and not told & fleet.tasks.keys()
    assert any(record.state is TaskState.PLACED for record in fleet.tasks.values())
    assert {name: record.epoch for name, record in fleet.records.items()} == {
        name: max(p.epoch for b in batches[:middle] for p in b.plans if p.instance_id == name)
        for name in ("i0", "i1")
    }


def test_resuming_a_truncated_journal_gives_the_same_outcomes():
    whole = busy_run()
    whole_totals = whole.run()
    batches = whole.journal.batches
    for length in range(len(batches) + 1):
        resumed = busy_run()
        resumed.engine.resume(batches[:length])
        totals = resumed.run()
        assert resumed.told.outcomes == whole.told.outcomes, f"after {length} batches"
        assert totals.num_done == whole_totals.num_done
        assert totals.end_ns == whole_totals.end_ns


class Killed(Exception):
    pass


def facts(outcomes):
    return sorted(outcome._replace(predicted_start_ns=None) for outcome in outcomes)


@pytest.mark.parametrize("moment", ["before the journal", "after the journal"])
def test_an_engine_that_dies_is_resumed_on_the_living_executor(moment: str):
    whole = busy_run()
    whole.run()
    for length in range(1, len(whole.journal.lines)):
        first = busy_run()
        kill_at(first, length, moment)
        with pytest.raises(Killed):
            first.run()
        second = busy_run()
        second.executor = second.engine.executor = first.executor
        second.engine.resume(first.journal.batches)
        second.run()
        # Events that died with the engine are told again, so within an instant the order of the
        # outcomes may differ, and so may what was foretold from them; their content may not.
        assert facts(second.told.outcomes) == facts(whole.told.outcomes), f"batch {length}"


def kill_at(run: Run, length: int, moment: str) -> None:
    write = run.journal.write

    def dying(*args: Any) -> None:
        dies = len(run.journal.lines) == length
        if not dies or moment == "after the journal":
            write(*args)
        if dies:
            raise Killed

    run.journal.write = dying  # type: ignore[method-assign]


def test_resuming_with_another_planner_is_refused():
    run = busy_run()
    run.run()
    other = busy_run()
    other.engine._decider.planner = FakePlanner({64: 20, 32: 6})
    with pytest.raises(MuxTuneError, match="cannot be resumed: batch"):
        other.engine.resume(run.journal.batches)


def test_a_finished_task_is_told_again_after_a_resume():
    """The executor lives on; the batch with its TASK_DONE never reached the journal."""
    first = Run(policy(), [task("a", 3), task("b", 9)], [instance()])
    until = next_batch_with(first, EventKind.TASK_DONE)
    second = Run(policy(), [task("a", 3), task("b", 9)], [instance()])
    second.executor = second.engine.executor = first.executor
    second.engine.resume(until)
    second.run()
    done = second.told.by_id()["a"]
    assert (done.state, done.steps, done.effective_tokens) == (TaskState.DONE, 3, 3 * 64)
    assert second.ended_s == {"a": 3.0, "b": 9.0}


def next_batch_with(run: Run, kind: EventKind) -> list[Any]:
    """Runs until the journal is about to get a batch with such an event; what it has by then."""
    write = run.journal.write

    def dying(time_ns: int, events: Any, *rest: Any) -> None:
        if any(event.kind is kind and isinstance(event.data, ResultData) for event in events):
            raise Killed
        write(time_ns, events, *rest)

    run.journal.write = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run.run()
    return run.journal.batches

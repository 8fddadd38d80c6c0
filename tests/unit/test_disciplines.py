"""Who of the waiting tasks comes first."""

from __future__ import annotations

import random
from typing import Any

import pytest

from muxtune.errors import ConfigError
from muxtune.fleet import TaskQueue
from muxtune.planning.disciplines import tokens_left
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import Discipline, TaskView
from tests.sim.fakes import Run, instance, task
from tests.unit.planner_helpers import task as view

NAMES = ["fifo_exclusive", "fifo_colocated", "fifo_shared", "tlora"]


def order_of(discipline: str, tasks: list[Any], name: str = "fifo_exclusive") -> list[str]:
    """In which tasks end on one instance that takes one at a time; the first holds it at once."""
    one = {"max_tasks_per_instance": 1} if name in ("fifo_shared", "tlora") else {}
    policy = CLUSTER_POLICIES.get(name)(discipline=discipline, **one)
    run = Run(policy, tasks, [instance()])
    run.run()
    return [outcome.task_id for outcome in run.told.outcomes]


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_takes_every_discipline(name: str):
    tasks = [
        task("first", 5),
        task("long", 9, 1.0, tenant="a"),
        task("short", 2, 2.0, priority=1, tenant="a"),
        task("due", 6, 3.0, deadline_ns=10**10, tenant="b"),
    ]
    expected = {
        "fifo": ["first", "long", "short", "due"],
        "priority": ["first", "short", "long", "due"],
        "shortest_remaining": ["first", "short", "due", "long"],
        "earliest_deadline": ["first", "due", "long", "short"],
    }
    for discipline, order in expected.items():
        assert order_of(discipline, tasks, name) == order


def test_the_tenant_with_the_fewest_places_goes_next():
    """Two instances; a tenant with many tasks holds both, then the other one gets every second."""
    tasks = [task(f"a{i}", 10, 0.1 * i, tenant="a") for i in range(6)]
    tasks += [task(f"b{i}", 10, 2.0 + 0.1 * i, tenant="b") for i in range(2)]
    policy = CLUSTER_POLICIES.get("fifo_exclusive")(discipline="fair_share")
    run = Run(policy, tasks, [instance("i0"), instance("i1")])
    run.run()
    started = sorted(run.told.outcomes, key=lambda outcome: (outcome.placed_ns, outcome.task_id))
    assert [outcome.tenant for outcome in started] == list("aababaaa")


def test_placements_of_one_event_are_shared_fairly_too():
    queue = TaskQueue()
    for i in range(4):
        queue.add(view(f"a{i}", tenant="a", arrival_ns=i))
        queue.add(view(f"b{i}", tenant="b", arrival_ns=10 + i))
    queue.lines.note_placed("a", 1)
    found = [item.task_id for item in queue.of_model("m", Discipline.FAIR_SHARE)]
    assert found == ["b0", "a0", "b1", "a1", "b2", "a2", "b3", "a3"]


def drawn(seed: random.Random, number: int) -> TaskView:
    return view(
        f"t{number:03d}",
        model=seed.choice(["m", "n"]),
        tenant=seed.choice("abc"),
        arrival_ns=seed.randint(0, 30),
        priority=seed.randint(0, 2),
        deadline_ns=seed.choice([None, seed.randint(1, 50)]),
        num_steps=seed.randint(5, 20),
        steps_done=seed.randint(0, 5),
    )


def by_definition(tasks: list[TaskView], discipline: Discipline) -> list[TaskView]:
    keys: dict[Discipline, Any] = {
        Discipline.FIFO: lambda t: 0,
        Discipline.PRIORITY: lambda t: -t.priority,
        Discipline.SHORTEST_REMAINING: tokens_left,
        Discipline.EARLIEST_DEADLINE: lambda t: 1 << 62 if t.deadline_ns is None else t.deadline_ns,
    }
    return sorted(tasks, key=lambda t: (keys[discipline](t), t.arrival_ns, t.task_id))


def test_indexes_agree_with_sorting_through_any_history():
    """Asked for at some time, then tasks come, leave and come back."""
    for number in range(30):
        seed = random.Random(number)
        queue, held = TaskQueue(), dict[str, TaskView]()
        for step in range(60):
            if held and seed.random() < 0.4:
                name = seed.choice(sorted(held))
                queue.remove(name)
                del held[name]
            else:
                item = drawn(seed, step)
                held[item.task_id] = item
                queue.add(item)
            if seed.random() < 0.3:
                for discipline in set(Discipline) - {Discipline.FAIR_SHARE}:
                    for model in ("m", "n"):
                        tasks = [t for t in held.values() if t.model == model]
                        found = list(queue.of_model(model, discipline))
                        assert found == by_definition(tasks, discipline)
                fair = list(queue.of_model("m", Discipline.FAIR_SHARE))
                assert sorted(fair) == sorted(t for t in held.values() if t.model == "m")


def test_a_discipline_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="shortest_remaining"):
        CLUSTER_POLICIES.get("fifo_shared")(discipline="lifo")

"""What tenants are promised: waiting told beforehand, deadlines, refusals with figures."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

import pytest

from muxtune import waiting
from muxtune.deciding import refusal_text
from muxtune.planners.exclusive import ExclusivePlanner
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import NS_PER_S, Estimate, Plan, Refusal
from tests.sim.fakes import Run, instance, seconds
from tests.sim.fakes import task as arriving
from tests.unit.planner_helpers import HandCost, task, view

# ------------------------------------------------------------------------------------ waiting


def full_run(num_waiting: int) -> Run:
    """Two instances for one task each; what waits starts as they end."""
    first = [arriving("a", steps=10), arriving("b", steps=30)]
    late = [arriving(f"c{i}", steps=5, arrival_s=2) for i in range(num_waiting)]
    policy = CLUSTER_POLICIES.get("fifo_shared")(max_tasks_per_instance=1)
    return Run(policy, first + late, [instance("i0"), instance("i1")])


def waits(run: Run) -> dict[str, Refusal]:
    return {
        refusal.task_ids[0]: refusal
        for batch in run.journal.batches
        for refusal in batch.refusals
        if "take no further task" in refusal.reason
    }


def test_a_task_that_waits_is_told_until_when_and_the_journal_and_the_results_say_so():
    run = full_run(1)
    run.run()
    told, outcome = waits(run), run.told.by_id()["c0"]
    assert set(told) == {"c0"}
    assert told["c0"].predicted_start_ns == outcome.predicted_start_ns == seconds(10)
    assert outcome.placed_ns == seconds(10)
    assert run.told.by_id()["a"].predicted_start_ns is None


def test_those_behind_are_told_later_times():
    run = full_run(4)
    run.run()
    starts = [run.told.by_id()[f"c{i}"].predicted_start_ns for i in range(4)]
    assert starts == [seconds(10), seconds(15), seconds(20), seconds(25)]
    assert starts == [run.told.by_id()[f"c{i}"].placed_ns for i in range(4)]


def test_those_far_behind_are_told_their_place_and_no_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "MOST_FORECAST", 2)
    run = full_run(4)
    run.run()
    told = waits(run)
    starts = [told[f"c{i}"].predicted_start_ns for i in range(4)]
    assert starts == [seconds(10), seconds(15), None, None]
    assert "1 wait before it" in told["c1"].reason
    assert "2 or more wait before it" in told["c3"].reason


def test_nobody_is_told_to_wait_where_there_is_room():
    policy = CLUSTER_POLICIES.get("fifo_shared")()
    run = Run(policy, [arriving("a"), arriving("b", arrival_s=1)], [instance()])
    run.run()
    assert waits(run) == {}


# ---------------------------------------------------------------------------------- deadlines


def planner_of(**options) -> MuxTunePlanner:
    return MuxTunePlanner(lambda model, device: HandCost(**options))


def alone_s(**fields) -> float:
    """All 10 steps of a task alone."""
    plan = planner_of().plan(view(task("a", **fields)), None)
    assert isinstance(plan, Plan)
    return 10 * plan.predicted.step_time_s["a"]


def by(share: float) -> int:
    return round(share * alone_s() * NS_PER_S)


def test_a_deadline_gets_a_task_the_turns_that_it_needs():
    tasks = [task("a", deadline_ns=by(2.05)), task("b"), task("c"), task("d")]
    plan = planner_of().plan(view(*tasks), None)
    assert isinstance(plan, Plan)
    assert 10 * plan.predicted.step_time_s["a"] <= 2.05 * alone_s()
    free = planner_of().plan(view(*(t._replace(deadline_ns=None) for t in tasks)), None)
    assert isinstance(free, Plan) and 10 * free.predicted.step_time_s["a"] > 2.05 * alone_s()


def test_time_that_has_passed_and_steps_that_are_done_count():
    tasks = [task("a", deadline_ns=by(4.1)), task("b"), task("c"), task("d")]
    late = view(*tasks)._replace(now_ns=by(2.0))
    half = [tasks[0]._replace(steps_done=5), *tasks[1:]]
    early_plan, late_plan, half_plan = (
        planner_of().plan(where, None)
        for where in (view(*tasks), late, view(*half)._replace(now_ns=by(2.0)))
    )
    step_s = [plan.predicted.step_time_s["a"] for plan in (early_plan, late_plan, half_plan)]
    assert 10 * step_s[1] <= 2.1 * alone_s() < 10 * step_s[0]
    assert step_s[2] == step_s[0]


def test_a_newcomer_that_would_break_a_deadline_is_refused_with_seconds():
    running = [task("a", deadline_ns=by(1.6)), task("b", max_slowdown=3.6)]
    planner = planner_of()
    before = planner.plan(view(running[0]), None)
    assert isinstance(before, Plan)
    both = planner.plan(view(*running), before)
    assert isinstance(both, Plan)  # 1.05 / 1.5 and 1.05 / 3.6 of the device
    third = planner.plan(view(*running, task("c", max_slowdown=2.0)), both)
    assert isinstance(third, Refusal)
    assert third.needed_s > third.available_s > 0
    assert "s a step" in refusal_text(third) and "deadline" in third.remedy


def test_a_promise_is_planned_for_with_a_margin():
    tasks = [task("a", max_slowdown=2.0), task("b"), task("c")]
    for margin in (0.0, 0.3):
        planner = MuxTunePlanner(lambda model, device: HandCost(), promise_margin=margin)
        plan = planner.plan(view(*tasks), None)
        assert isinstance(plan, Plan)
        assert 10 * plan.predicted.step_time_s["a"] <= 2.0 / (1 + margin) * alone_s() * 1.000001


def test_a_deadline_that_cannot_be_kept_binds_nobody():
    tasks = [task("a", deadline_ns=by(0.5)), task("b"), task("c")]
    free = [t._replace(deadline_ns=None) for t in tasks]
    answers = [planner_of().plan(view(*some), None) for some in (tasks, free)]
    assert isinstance(answers[0], Plan) and answers[0].htasks == answers[1].htasks


def test_running_tasks_are_not_refused_for_deadlines_that_no_longer_fit_together():
    planner = planner_of()
    tasks = [task("a", deadline_ns=by(2.6)), task("b", deadline_ns=by(2.6))]
    before = planner.plan(view(*tasks), None)
    assert isinstance(before, Plan)
    later = view(*tasks)._replace(now_ns=by(1.0), tasks=tuple(tasks))
    assert isinstance(planner.plan(later, before), Plan)
    newcomer = planner.plan(later, planner.plan(view(tasks[0]), None))
    assert isinstance(newcomer, Refusal)


def test_the_padding_planners_honour_deadlines_too():
    planner = ExclusivePlanner(lambda model, device: HandCost())
    assert isinstance(planner.plan(view(task("a", deadline_ns=by(9.0))), None), Plan)


@pytest.mark.parametrize("field", ["needed_bytes", "needed_s"])
def test_refusals_tell_their_figures(field):
    text = refusal_text(Refusal("no", (), **{field: 7, field.replace("needed", "available"): 5}))
    assert "7" in text and "5" in text


# ------------------------------------------------------------------------------- whole lives


class CostlyCost(HandCost):
    """Every shape that an instance has not run takes ``capture_s`` to prepare."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def transition_s(self, previous, new):
        if previous is None:
            previous = new._replace(htasks=())
        seconds = self.seconds * super().transition_s(previous, new).value
        return Estimate(seconds, seconds, seconds)


def promised(name: str, **fields):
    return task(name, max_slowdown=2.0, placed_ns=0, num_steps=1000, **fields)


def joined(costs: CostlyCost, spent_s: float = 0.0) -> Plan | Refusal:
    """A promised task that runs alone is joined by others after a while without a step."""
    planner = MuxTunePlanner(lambda model, device: costs)
    alone = view(promised("a"))
    before = planner.plan(alone, None)
    assert isinstance(before, Plan)
    now_ns = round(spent_s * NS_PER_S)
    first = promised("a", steps_ns=now_ns)
    others = [task(name, rank=16, num_steps=1000) for name in "bcde"]
    return planner.plan(view(first, *others)._replace(now_ns=now_ns), before)


def life_s() -> float:
    return 100 * alone_s()  # of the 1000 steps of a promised task


def test_what_takeovers_cost_counts_against_a_promise():
    cheap, costly = joined(CostlyCost(0.0)), joined(CostlyCost(0.25 * life_s()))
    assert isinstance(cheap, Plan) and isinstance(costly, Plan)
    steps_s = [plan.predicted.step_time_s["a"] for plan in (cheap, costly)]
    assert steps_s[1] < steps_s[0] <= 2 * alone_s() / 10
    taken_s = costly.predicted.takeover_s
    assert taken_s > 0.25 * life_s() and taken_s + 1000 * steps_s[1] <= 2 * life_s()


def test_a_newcomer_whose_takeover_would_break_a_promise_is_refused_with_seconds():
    refused = joined(CostlyCost(1.2 * life_s()))
    assert isinstance(refused, Refusal)
    assert refused.needed_s > refused.available_s > 0 and "to take the plan over" in refused.reason


def test_time_that_a_promised_task_has_lost_is_not_lost_twice():
    steps_s = []
    for spent in (0.0, 0.4):
        plan = joined(CostlyCost(0.0), spent * life_s())
        assert isinstance(plan, Plan)
        steps_s.append(plan.predicted.step_time_s["a"])
    assert 0.4 * life_s() + 1000 * steps_s[1] <= 2 * life_s() < 0.4 * life_s() + 1000 * steps_s[0]


def test_the_running_plan_is_kept_where_a_plan_of_its_own_would_break_a_promise():
    """When "c" leaves, preparing the best plan for two would cost "a" more than it has left."""
    costs = CostlyCost(0.0)
    planner = MuxTunePlanner(lambda model, device: costs)
    tasks = [promised("a"), task("b", num_steps=1000, length=32), task("c", num_steps=1000)]
    before = planner.plan(view(*tasks), None)
    assert isinstance(before, Plan)
    costs.seconds = life_s()
    after = planner.plan(view(*tasks[:2]), before)
    assert isinstance(after, Plan) and costs.transition_s(before, after).value == 0
    assert 1000 * after.predicted.step_time_s["a"] <= 2 * life_s()


def test_a_promise_that_cannot_be_kept_any_more_binds_no_newcomer_out():
    plan = joined(CostlyCost(0.0), 5 * life_s())
    assert isinstance(plan, Plan)
    assert plan.predicted.step_time_s["a"] <= 2 * alone_s() / 10

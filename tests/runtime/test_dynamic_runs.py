"""Dynamic runs: how they are drawn, and what their prediction takes into account."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from muxtune import codec
from muxtune.config import conf_dir, register_schemas
from muxtune.cost.schema import CAPTURED, Profile, load_profile
from muxtune.runtime.bank import adapter_slot
from muxtune.types import NS_PER_S
from muxtune.validation.dynamic import (
    NEAR,
    NEARER,
    NOMINAL,
    DynamicCase,
    Log,
    Rehearsal,
    as_trained,
    draw_dynamic,
    first_difference,
    planning_here_s,
    with_prediction,
)
from muxtune.validation.models import Models
from muxtune_sim import SimOptions

DURATION_S, MOST_ROWS = 24.0, 2048


@pytest.fixture(scope="module")
def profile() -> Profile:
    folder = Path(str(files("muxtune.cost") / "data" / "profiles"))
    return load_profile(folder / "h200-sxm_llama-2-7b.json")


@pytest.fixture(scope="module")
def cases(profile: Profile) -> list[DynamicCase]:
    return draw_dynamic(Models(profile), DURATION_S, MOST_ROWS)


def test_a_profile_draws_the_same_runs_each_time(
    profile: Profile, cases: list[DynamicCase]
) -> None:
    assert draw_dynamic(Models(profile), DURATION_S, MOST_ROWS) == cases
    other = profile._replace(content_hash="0" * 64)
    assert draw_dynamic(Models(other), DURATION_S, MOST_ROWS) != cases


def test_drawn_runs_are_no_ties_and_have_what_runs_are_for(
    profile: Profile, cases: list[DynamicCase]
) -> None:
    """All hold where times are off by little, most where they are off by more."""
    rehearsal = Rehearsal(profile)
    assert sum(not rehearsal.is_tie(case, NEAR) for case in cases) >= 2
    for case in cases:
        assert not rehearsal.is_tie(case, NEARER), case.name
        log = rehearsal.run(case, NOMINAL)
        last_s = max(end.ended_ns for end in log.ended.values()) / NS_PER_S
        assert 0.8 * DURATION_S < last_s < 1.25 * DURATION_S
        arrivals = [task.arrival_ns for task in case.tasks]
        assert arrivals == sorted(set(arrivals)) and len(arrivals) >= 5
    shared, *queues = cases
    ends = {end.state for end in rehearsal.run(shared, NOMINAL).ended.values()}
    assert ends == {"done", "cancelled"}
    for case in queues:
        ended = rehearsal.run(case, NOMINAL).ended
        waits = [(ended[t.task_id].placed_ns or 0) - t.arrival_ns for t in case.tasks]
        assert sum(wait_ns > 2 * NS_PER_S for wait_ns in waits) >= 2


def test_a_drift_is_heard(profile: Profile, cases: list[DynamicCase]) -> None:
    """It changes plans, and is raised by the engine, not told by an executor."""
    rehearsal = Rehearsal(profile)
    usual = rehearsal.run(cases[1], NOMINAL)
    slow = rehearsal.run(cases[1], NOMINAL._replace(steps=1.7))
    assert usual.drifts == 0 < slow.drifts
    again = Log.of_json(slow.to_json())
    again.lines = ["another plan", *again.lines[1:]]
    found = first_difference(usual, again)
    wanted = "ended in another order" if slow.order != usual.order else "drift was told"
    assert found is not None and wanted in found["why"]


def test_a_task_that_comes_just_as_another_ends_is_a_tie(
    profile: Profile, cases: list[DynamicCase]
) -> None:
    """Before its last round is over they run together; after it one follows the other."""
    rehearsal = Rehearsal(profile)
    first, second = cases[1].tasks[:2]
    alone = DynamicCase("alone", (first,), 2)
    end_ns = rehearsal.run(alone, NOMINAL).ended[first.task_id].ended_ns
    assert not rehearsal.is_tie(alone, NEAR)
    model = rehearsal.book(profile.model_name, profile.device_name)
    last_round_ns = end_ns - int(model.finish_s(adapter_slot(first)).value * NS_PER_S)
    for arrival_ns, is_tie in ((last_round_ns - 1_000_000, True), (2 * end_ns, False)):
        both = (first, second._replace(arrival_ns=arrival_ns))
        assert rehearsal.is_tie(DynamicCase("both", both, 2), NEARER) is is_tie


def test_what_planning_takes_is_charged(profile: Profile, cases: list[DynamicCase]) -> None:
    case = cases[1]
    assert planning_here_s(case, profile) > 0
    measured = Rehearsal(profile).run(case, NOMINAL)
    row = {"name": case.name, "max_tasks": case.max_tasks, "specs": codec.encode(case.tasks)}
    row |= {"measured": measured.to_json(), "error": ""}
    late, exact = (
        with_prediction({**row, "planning_s": planning_s}, profile)["tasks"]
        for planning_s in (0.2, NOMINAL.planning_s)
    )
    assert all(task["predicted_s"] == task["measured_s"] for task in exact)
    assert all(task["predicted_s"] > task["measured_s"] for task in late)


def test_users_can_simulate_as_validations_predict() -> None:
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        given = compose("simulate", overrides=["backend=as_trained"]).backend
    assert given.pop("name") == "sim"
    assert SimOptions(**given) == as_trained(CAPTURED, given.planning_base_s)

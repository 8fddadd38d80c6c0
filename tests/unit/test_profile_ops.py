"""What a cost model refuses of a profile when it is built, naming the operation."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from muxtune import build
from muxtune.cost import ProfiledCostModel, nominal_load, ops
from muxtune.cost.book import CostBook
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.op_sizes import needed_ops
from muxtune.cost.schema import Profile, load_profile
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.errors import ProfileError
from muxtune.types import AdapterSlot, ReplicaShape, ShapeKey

LLAMA_7B = model_shape("llama-2-7b")
LOAD = nominal_load(ShapeKey(64, 16, (AdapterSlot("lora", 16, ("all-linear",)),) * 2))


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return load_profile(build.profile_path("h100-sxm_llama-2-7b", shipped_only=True))


def changed(profile: Profile, path: tuple[Any, ...], value: object) -> Profile:
    """``path``: of an operation."""
    found = copy.deepcopy(dict(profile.ops))
    target: Any = found
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return profile._replace(ops=found)


def without(profile: Profile, name: str) -> Profile:
    return profile._replace(ops={key: op for key, op in profile.ops.items() if key != name})


@pytest.mark.parametrize("name", list(needed_ops(LLAMA_7B)))
def test_an_operation_that_every_step_needs_is_named_when_the_model_is_built(
    shipped: Profile, name: str
) -> None:
    for model in (LLAMA_7B, model_shape("llama-2-13b")):
        with pytest.raises(ProfileError, match=rf"'{name}'.*muxtune profile"):
            CapturedCostModel(model, without(shipped, name))
    with pytest.raises(ProfileError, match=name):
        CostBook(profiles=[without(shipped, name)])("llama-2-7b", "H100-SXM")


@pytest.mark.parametrize("name", list(needed_ops(LLAMA_7B)))
def test_of_a_profile_without_steps_it_is_named_when_it_is_asked_for(
    shipped: Profile, name: str
) -> None:
    model = CapturedCostModel(LLAMA_7B, without(shipped, name)._replace(steps=()))
    with pytest.raises(ProfileError, match=rf"'{name}'.*muxtune profile"):
        model.pass_times_s([LOAD], ReplicaShape())


def test_what_only_some_steps_need_may_be_missing(shipped: Profile) -> None:
    for name in ("mixed_forward.4096x4096", "part_factor.4096x4096", "finish", "takeover"):
        model = CapturedCostModel(LLAMA_7B, without(shipped, name))
        assert model.pass_times_s([LOAD], ReplicaShape()).value[0] > 0


SITE, ATTENTION = "site_forward.4096x4096", "attention_backward.32x32x128"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((SITE, "points", 3, "rows"), 0.0, f"'{SITE}' point 3 has rows 0.0"),
        ((SITE, "points", 3, "slots"), 0.5, f"'{SITE}' point 3 has slots 0.5"),
        ((SITE, "points", 3, "slots"), 1e12, f"'{SITE}' point 3 has slots"),
        ((SITE, "points", 3, "rows"), 1e12, f"'{SITE}' point 3 has rows"),
        ((SITE, "points", 3, "rank"), 0, f"'{SITE}' point 3 has rank 0"),
        ((SITE, "axes"), ["slots", "rows", "rank"], f"'{SITE}' has axes"),
        (("frozen_forward.4096x4096", "points", 0, "rows"), 0, "has rows 0"),
        (("frozen_forward.4096x4096", "axes"), [], "'frozen_forward.4096x4096' has axes"),
        ((ATTENTION, "points", 1, "pairs"), 0.0, f"'{ATTENTION}' point 1 has pairs 0.0"),
        ((ATTENTION, "axes"), ["rows"], f"'{ATTENTION}' has axes"),
        ((ATTENTION, "points", 1, "sequences_3"), None, "point 1 does not tell its sequences"),
        ((ATTENTION, "points", 1, "sequences_3"), 1e17, "point 1 does not tell its sequences"),
        (("extra_ia3_forward.4096", "points", 0, "size"), 0, "has size 0"),
        (("adamw_idle", "points", 0, "elements"), 0, "'adamw_idle' point 0 has elements 0"),
        (("capture", "axes"), ["first"], "'capture' has axes"),
        (("finish", "axes"), [], "'finish' has axes"),
    ],
)
def test_sizes_that_nothing_can_be_counted_by_are_refused(
    shipped: Profile, path: tuple[Any, ...], value: object, message: str
) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        CapturedCostModel(LLAMA_7B, changed(shipped, path, value))
    assert "muxtune profile" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("site_forward.4096x4097", "is of no linear of llama-2-7b"),
        ("site_factor.wide", "is not named by 2 sizes"),
        ("attention_forward.32x0x128", "is not named by 3 sizes"),
        ("embedding", "is not named by 1 sizes"),
        ("adamw_idle.4", "is not named by 0 sizes"),
    ],
)
def test_names_that_tell_no_size_are_refused(shipped: Profile, name: str, message: str) -> None:
    kind = name.partition(".")[0]
    like = next(op for key, op in shipped.ops.items() if key.partition(".")[0] == kind)
    with pytest.raises(ProfileError, match=f"'{name}' {message}"):
        CapturedCostModel(LLAMA_7B, changed(shipped, (name,), like))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_multiprocessors": 0}, {"num_multiprocessors": "132"}, {"half_cost": None},
        {"half_cost": 0.0}, {"tiles": []}, {"tiles": None}, {"tiles": [[128, 256, 1.0]]},
        {"tiles": [[128, 0, 1.0, True]]}, {"tiles": [[128, 256, 0.0, True]]},
        {"tiles": [[10**400, 256, 1.0, True]]}, {"tiles": ["wide"]},
    ],
)  # fmt: skip
def test_tiles_that_are_none_are_refused(shipped: Profile, changes: dict[str, Any]) -> None:
    tiles = {**shipped.program["tiles"], **changes}
    wrong = shipped._replace(program={**shipped.program, "tiles": tiles})
    with pytest.raises(ProfileError, match=r"program\.tiles.*muxtune profile"):
        CapturedCostModel(LLAMA_7B, wrong)


def test_tiles_that_are_missing_in_part_are_refused(shipped: Profile) -> None:
    for tiles in ({}, None, [1, 2]):
        wrong = shipped._replace(program={**shipped.program, "tiles": tiles})
        with pytest.raises(ProfileError, match=r"program\.tiles"):
            CapturedCostModel(LLAMA_7B, wrong)


def test_captured_steps_are_of_llama_s_blocks(shipped: Profile) -> None:
    other = model_shape("opt-6.7b")
    with pytest.raises(ProfileError, match=r"program\.style.*model\.family is opt"):
        CapturedCostModel(other, shipped._replace(model=other._asdict()))


def test_an_eager_profile_s_operations_have_the_sizes_that_are_asked() -> None:
    shape = ModelShape("tiny", 2, 32, 4, 2, 8, 64, 100)
    times = {"median_s": 1.0, "p05_s": 1.0, "p95_s": 1.0, "repeats": 3}
    for name, axes in (
        ("linear_forward.32x32", ["rows", "rank"]),
        ("attention_forward.4x2x8", ["rows"]),
        ("layer_overhead_forward", ["rows"]),
        ("adapter_load", []),
    ):
        sizes = dict.fromkeys(axes, 16.0)
        op = {"unit": "s", "axes": axes, "points": [{**sizes, **times}]}
        profile = Profile({"name": "cpu"}, {}, shape._asdict(), "", {name: op}, "")
        with pytest.raises(ProfileError, match=f"'{name}' has axes"):
            ProfiledCostModel(shape, profile)
    names = [op.name for op in (*ops.block_ops(shape, 1.0, 4), *ops.edge_ops(shape, 1.0, 4))]
    assert "linear_forward.32x32" in names and "layer_overhead_forward" in names

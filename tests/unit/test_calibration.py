"""How operations add up to steps: planted factors are found, and honestly bounded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from muxtune.cost.calibration import (
    Composition,
    MemoryFit,
    WholeStep,
    fit_composition,
    fit_memory,
    step_features,
)
from muxtune.cost.devices import device_figures
from muxtune.cost.schema import Profile, profile_warnings
from muxtune.cost.transfer import time_ratio
from muxtune.types import AdapterSlot, PassLoad, ShapeKey

SLOT = AdapterSlot("lora", 8, ("q_proj",))


def load(chunks: int, slots: int = 1) -> PassLoad:
    return PassLoad(ShapeKey(64, chunks, (SLOT,) * slots), 100.0 * chunks, 64.0 * chunks, (0,))


def breakdown_s(each: PassLoad) -> Mapping[str, float]:
    rows = each.shape.padded_tokens
    return {"backbone": 1e-5 * rows, "adapters": 2e-6 * rows * len(each.shape.slots)}


def features_of(step: WholeStep) -> tuple[float, float, float]:
    return step_features(step.loads, breakdown_s)


def steps(work: float, adapters: float, pass_s: float, noise: float = 0.0) -> list[WholeStep]:
    random, found = np.random.default_rng(3), []
    for chunks, slots, passes in ((4, 1, 3), (16, 4, 4), (64, 8, 2), (8, 8, 6), (32, 2, 3)):
        loads = (load(chunks, slots),) * passes
        features = step_features(loads, breakdown_s)
        seconds = float(np.dot(features, (work, adapters, pass_s)))
        repeats = tuple(seconds * (1 + noise * random.standard_normal(3)))
        found.append(WholeStep(f"{chunks}", loads, repeats, 0))
    return found


def test_planted_factors_come_out():
    fit = fit_composition(steps(1.2, 0.5, 1e-3), features_of)
    for step in steps(1.2, 0.5, 1e-3):
        predicted = fit.seconds(step_features(step.loads, breakdown_s))
        assert predicted == pytest.approx(step.median_s, rel=0.02)
    assert fit.work == pytest.approx(1.2, rel=0.03) and fit.adapters == pytest.approx(0.5, abs=0.1)
    assert fit.num_steps == 5


def test_noise_widens_the_interval_and_few_steps_do_not_overrule_the_operations():
    exact, noisy = (fit_composition(steps(1.0, 1.0, 0.0, n), features_of) for n in (0.0, 0.1))
    assert exact.relative_error < 0.05 < noisy.relative_error
    one = fit_composition(steps(1.0, 1.0, 0.0)[:1], features_of)
    assert one.adapters == pytest.approx(1.0, abs=0.01) and one.relative_error > 0.1
    assert fit_composition([], features_of) == Composition()


def test_memory_of_passes_is_scaled_and_few_steps_change_nothing():
    found = steps(1, 1, 0)
    sizes = {step.name: 1000.0 * (index + 1) for index, step in enumerate(found)}
    found = [step._replace(peak_bytes=int(500 + 1.5 * sizes[step.name] + 70)) for step in found]
    fit = fit_memory(found, lambda _: 500, lambda step: int(sizes[step.name]))
    assert fit.pass_factor == pytest.approx(1.5, rel=0.01)
    assert fit.fixed_bytes == pytest.approx(70, abs=5)
    assert fit_memory(found[:2], lambda _: 0, lambda _: 1) == MemoryFit()
    hidden = [step._replace(peak_bytes=-at) for at, step in enumerate(found)]
    assert fit_memory(hidden, lambda _: 0, lambda _: 1) == MemoryFit()
    assert fit_memory([*found, *hidden], lambda _: 500, lambda step: int(sizes[step.name])) == fit


def test_a_step_survives_its_json():
    step = steps(1.0, 1.0, 0.0)[1]
    assert WholeStep.of_json(step.to_json()) == step


def test_a_device_that_others_used_is_named():
    three = tuple(steps(1.0, 1.0, 0.0)[:3])
    profile = Profile({}, {}, {}, "", {}, "", steps=three, quality={"spread": 0.4})
    (line,) = profile_warnings(profile)
    assert "40.0%" in line and "muxtune profile" in line
    less = profile._replace(quality={"spread": 0.1})
    assert profile_warnings(less) == []
    replays = less._replace(device={"kind": "gpu"}, program={"style": "captured"})
    beside = replays._replace(quality={"spread": 0.042})  # as measured beside another process
    assert "4.2%" in profile_warnings(beside)[0], "graphs on a GPU of one's own repeat to 1%"
    assert profile_warnings(replays._replace(quality={"spread": 0.02})) == []


@pytest.mark.parametrize("style", ["eager", "captured"])
def test_too_few_whole_steps_are_told(style: str):
    some = tuple(steps(1.0, 1.0, 0.0))
    profile = Profile({"kind": "gpu"}, {}, {}, "", {}, "", {"style": style}, some[:3])
    assert profile_warnings(profile) == []
    (line,) = profile_warnings(profile._replace(steps=some[:1]))
    for part in ("profile of 1 whole step:", "3 or more", "intervals are wide", "budget_s"):
        assert part in line
    told = profile_warnings(profile._replace(steps=()))
    # Of an eager program without steps the interval is what its operations' repeats spread by.
    assert [line[:26] for line in told] == ["profile of 0 whole steps: "] * (style == "captured")


def test_a_profile_is_carried_over_by_what_bounds_each_operation():
    h100, h200 = device_figures("H100"), device_figures("H200")
    faster = h100.memory_bytes_per_s / h200.memory_bytes_per_s
    assert faster < 0.75 and h100.peak_flops == h200.peak_flops

    def ratio(name: str, rows: float) -> float:
        return time_ratio(name, {"rows": rows}, 2, h100, h200)

    assert ratio("frozen_forward.4096x4096", 1) == pytest.approx(faster)
    assert ratio("frozen_forward.4096x4096", 8192) == pytest.approx(1.0)
    assert ratio("add_norm_forward.4096", 8192) == pytest.approx(faster)
    assert ratio("attention_forward.32x32x128", 8192) == 1.0
    assert time_ratio("capture", {"layers": 32}, 2, h100, h200) == 1.0


def test_what_the_host_does_takes_as_long_on_another_gpu_and_exchanges_go_by_the_link():
    """Also where the peaks differ, as those of an A100 and an H100 do by three times."""
    a100, h100 = device_figures("A100"), device_figures("H100")
    links = a100.link_bytes_per_s / h100.link_bytes_per_s
    assert a100.peak_flops < 0.4 * h100.peak_flops and 0.5 < links < 0.9

    def ratio(name: str, **point: float) -> float:
        return time_ratio(name, point, 2, a100, h100)

    takeover = dict.fromkeys(("joins", "join_parameters", "moves", "move_parameters"), 1.0)
    assert ratio("takeover", rebuilds=1.0, **takeover) == 1.0
    assert ratio("finish", parameters=4e7) == ratio("leave", layers=32) == 1.0
    for name in ("p2p", "all_reduce.tp2"):
        assert ratio(name, bytes=1 << 20) == pytest.approx(links)
        without = time_ratio(name, {"bytes": 1.0}, 2, a100._replace(link_bytes_per_s=0.0), h100)
        assert without == 1.0


def test_thin_products_of_adapters_are_bound_by_bytes():
    a100, h100 = device_figures("A100"), device_figures("H100")
    faster = a100.memory_bytes_per_s / h100.memory_bytes_per_s
    point = {"rank": 16.0, "rows": 4096.0}
    found = time_ratio("adapter_lora_forward.4096x4096", point, 2, a100, h100)
    assert found == pytest.approx(faster)


def test_what_the_fit_cannot_explain_is_in_the_interval():
    """Repeats agree with each other, but not with the operations."""
    odd = [
        step._replace(repeats_s=tuple(s * (1.2 if index % 2 else 0.8) for s in step.repeats_s))
        for index, step in enumerate(steps(1.0, 1.0, 0.0))
    ]
    assert fit_composition(odd, features_of).relative_error > 0.15

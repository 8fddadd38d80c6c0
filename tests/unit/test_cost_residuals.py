"""How captured passes' operations add up: what was planted comes out of whole steps."""

from __future__ import annotations

import numpy as np
import pytest

from muxtune import build
from muxtune.cost import nominal_load
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.residuals import PassSums, StepSums, fit_adding
from muxtune.cost.schema import Profile, load_profile
from muxtune.cost.shapes import model_shape
from muxtune.types import AdapterSlot, PassLoad, ReplicaShape, ShapeKey

PLANTED = {"site": 1.3, "backbone": 0.97}
PASS_S = 3e-4


def place(rows: int, slots: int) -> tuple[float, ...]:
    return float(np.log2(rows)), float(np.log2(slots)), 4.0, 1.0


def sums(rows: int, slots: int, num_blocks: int) -> PassSums:
    seconds = {
        "backbone": 1.5e-6 * rows * num_blocks,
        "site": (2e-5 * slots + 1e-7 * rows) * num_blocks,
        "loss": 7e-7 * rows,
    }
    blocks_s = seconds["backbone"] + seconds["site"]
    return PassSums(seconds, blocks_s, num_blocks, place(rows, slots), seconds["site"])


def waste(rows: int) -> float:
    """Of blocks with few rows, as kernels that wait for each other have it."""
    return 0.1 * np.exp(-rows / 400)


def measured_s(item: PassSums, rows: int) -> float:
    blocks_s = sum(PLANTED.get(c, 1.0) * item.seconds[c] for c in ("backbone", "site"))
    return (1 + waste(rows)) * blocks_s + item.seconds["loss"] + PASS_S


def steps(noise: float) -> list[StepSums]:
    random, found = np.random.default_rng(5), []
    for num_blocks in (4, 32):
        for rows in (128, 256, 512, 1024, 2048, 4096):
            for slots in (1, 4, 12):
                item = sums(rows, slots, num_blocks)
                time_s = 3 * measured_s(item, rows) * (1 + noise * random.standard_normal())
                found.append(StepSums((item,) * 3, time_s))
    return found


def predicted_s(fit, item: PassSums) -> float:
    g, h, _ = fit.at(item)
    of = {"backbone": g, "site": g + h, "loss": 0.0}
    seconds = sum((fit.factors.get(cause, 1.0) + of[cause]) * item.seconds[cause] for cause in of)
    return seconds + fit.filler * item.filler_s + fit.pass_s + item.num_blocks * fit.block_s


@pytest.mark.parametrize("num_blocks", [4, 5, 32])
def test_shapes_between_those_that_were_measured_come_out(num_blocks: int):
    fit = fit_adding(steps(0.0))
    errors = []
    for rows, slots in ((180, 1), (700, 2), (1500, 8), (3000, 4)):
        item = sums(rows, slots, num_blocks)
        wanted_s = measured_s(item, rows)
        times = predicted_s(fit, item), sum(item.seconds.values())
        errors.append([abs(time_s / wanted_s - 1) for time_s in times])
    fitted, alone = np.mean(errors, axis=0)
    assert fitted < 0.02 and fitted < 0.4 * alone, errors


def test_the_interval_grows_with_noise_and_covers():
    quiet, noisy = fit_adding(steps(0.001)), fit_adding(steps(0.05))
    item = sums(700, 2, 4)
    assert quiet.at(item).relative_error < 0.03 < noisy.at(item).relative_error < 0.3
    inside = []
    for rows in (150, 300, 700, 1500, 3000):
        item, random = sums(rows, 3, 8), np.random.default_rng(rows)
        times = measured_s(item, rows) * (1 + 0.05 * random.standard_normal(40))
        off = np.abs(predicted_s(noisy, item) / times - 1)
        inside += list(off <= noisy.at(item).relative_error)
    assert 0.8 <= np.mean(inside) <= 1.0


def test_filler_that_is_computed_with_faster_is_told_apart():
    found = []
    for index, step in enumerate(steps(0.0)):
        item = step.passes[0]
        idle_s = (0.1, 0.3, 0.6)[index % 3] * item.blocks_s
        passes = (item._replace(filler_s=idle_s),) * 3
        found.append(StepSums(passes, step.measured_s - 3 * 0.15 * idle_s))
    assert fit_adding(found).filler == pytest.approx(-0.15, abs=0.03)


def test_a_shape_far_from_all_is_less_certain():
    fit = fit_adding([s for s in steps(0.0) if s.passes[0].place[0] <= 10])
    near, far = (sums(rows, 4, 4) for rows in (512, 65536))
    assert fit.at(far).relative_error > fit.at(near).relative_error


def test_few_steps_hardly_change_anything():
    one = fit_adding(steps(0.0)[:1])
    assert one.factors["backbone"] == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError):
        fit_adding([])


def test_intervals_are_as_narrow_as_the_steps_predicted_from_each_other() -> None:
    """Also where the process by itself expects more of noise than there is."""
    fit = fit_adding(steps(0.002))
    assert fit.widening < 1.0
    deviations = np.sqrt(1.0 / np.diag(fit.inverse))
    inside = np.abs(fit.errors) <= 1.645 * fit.widening * deviations + 1e-12
    assert np.mean(inside) >= 0.9


def test_what_is_held_at_nothing_leaves_no_bias() -> None:
    """Passes that take less than their operations by a constant: no constant is negative, so the
    other terms have to say it."""
    quicker = [s._replace(measured_s=s.measured_s - 3 * (PASS_S + 2e-4)) for s in steps(0.0)]
    fit = fit_adding(quicker)
    assert fit.pass_s == 0.0
    off = [sum(predicted_s(fit, p) for p in s.passes) / s.measured_s - 1.0 for s in quicker]
    assert abs(np.mean(off)) < 1e-3


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return load_profile(build.profile_path("h100-sxm_llama-2-7b", shipped_only=True))


def loads(profile: Profile) -> list[PassLoad]:
    """Of shapes alone, and of micro-batches."""
    slots = (AdapterSlot("lora", 16, ("all-linear",)),) * 4
    shapes = [nominal_load(ShapeKey(64, chunks, slots)) for chunks in (4, 16, 40)]
    laid_out = [step.loads[0] for step in profile.steps[-8:]]
    assert all(load.layout is not None for load in laid_out)
    return [*shapes, *laid_out]


@pytest.mark.parametrize("model", ["llama-2-7b", "llama-2-13b"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_steps_tell_nothing_of_how_far_off_they_are(
    shipped: Profile, model: str, count: int
) -> None:
    """Of suites of two devices 95% of steps were within 0.18 to 0.24 of what no or one step tells,
    where the process by itself expects less than 0.1."""
    cost = CapturedCostModel(model_shape(model), shipped._replace(steps=shipped.steps[:count]))
    times = cost.pass_times_s(loads(shipped), ReplicaShape())
    assert (times.high / times.value - 1.0 >= 0.2 - 1e-12).all()
    assert (1.0 - times.low / times.value >= 0.2 - 1e-12).all()
    assert cost.composition.relative_error >= 0.2


def test_many_steps_tell_it(shipped: Profile) -> None:
    cost = CapturedCostModel(model_shape("llama-2-7b"), shipped)
    times = cost.pass_times_s(loads(shipped), ReplicaShape())
    assert np.median(times.high / times.value - 1.0) < 0.1
    assert cost.composition.relative_error < 0.1

"""Layer times: what was put in comes out, errors are of held-out samples, bad input is named."""

import numpy as np
import pytest

from muxtune.errors import ConfigError
from muxtune.planning.lobra import (
    Communication,
    HomogeneousStep,
    LayerSample,
    LayerTimes,
    ReplicaTimes,
    SequenceBatch,
    fit_communication,
    fit_layer_times,
    layer_fits,
    predicted_step_s,
)
from muxtune.types import ReplicaShape

KNOWN = (2e-11, 1e-11, 3e-6, 5e-7, 1e-5, 2e-3)


def samples(noise: float = 0.0, coefficients=KNOWN) -> list[LayerSample]:
    generator = np.random.default_rng(3)
    layer_times = LayerTimes({1: coefficients})
    return [
        LayerSample(1, b, s, layer_times.seconds(1, b, s) * (1 + noise * generator.normal()))
        for s in (64, 200, 512, 1000, 2048, 4096, 8192)
        for b in (1, 2, 3, 8, 16)
    ]


def test_known_times_come_back():
    fitted = fit_layer_times(samples())
    for sample in samples():
        seconds = fitted.seconds(1, sample.batch, sample.length_tokens)
        assert seconds == pytest.approx(sample.seconds, rel=1e-6)


def test_errors_follow_the_noise():
    fit = layer_fits(samples(noise=0.05))[0]
    assert 0.01 < fit.mean_error < 0.08
    assert fit.mean_error < fit.held_out_mean_error


def test_time_per_sequence_falls_with_the_batch():
    fitted = fit_layer_times(samples(noise=0.2))
    assert min(fitted.coefficients[1]) >= 0.0
    each = [fitted.seconds(1, b, 700) / b for b in range(1, 20)]
    assert each == sorted(each, reverse=True)


@pytest.mark.parametrize(
    "wrong", [LayerSample(1, 0, 8, 1.0), LayerSample(1, 1, 8, float("nan")), None]
)
def test_bad_samples_are_refused(wrong):
    with pytest.raises(ConfigError, match="layer_times"):
        fit_layer_times([wrong] if wrong else [])


def test_unknown_tensor_parallel_degree():
    with pytest.raises(ConfigError, match="degree 4"):
        fit_layer_times(samples()).seconds(4, 1, 128)


# ----------------------------------------------------------------------------- pipeline, steps


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 8, 21])
def test_closed_form_is_the_played_pipeline_when_micro_batches_are_equal(stages, count):
    times = ReplicaTimes(LayerTimes({2: KNOWN}), 32, Communication(1e-6))
    shape, batches = ReplicaShape(2, stages), [SequenceBatch(2, 1024)] * count
    played_s, closed_s = times.played_s(shape, batches), times.step_s(shape, batches)
    transfers_s = 2 * times.transfer_s(batches[0].tokens)
    assert closed_s - transfers_s <= played_s <= closed_s * (1 + 1e-6)
    still = times._replace(communication=Communication())
    assert still.played_s(shape, batches) == pytest.approx(still.step_s(shape, batches))


def test_played_pipeline_of_unequal_micro_batches_is_within_what_is_possible():
    times = ReplicaTimes(LayerTimes({1: KNOWN}), 32)
    shape = ReplicaShape(1, 4)
    batches = [SequenceBatch(b, s) for b, s in ((1, 64), (4, 512), (1, 4096), (2, 64), (3, 1000))]
    passes = [times.pass_s(shape, batch) for batch in batches]
    assert sum(passes) + 3 * min(passes) <= times.played_s(shape, batches)
    assert times.played_s(shape, batches) <= 4 * sum(passes)


def test_communication_comes_back():
    layer_times, truth = LayerTimes({1: KNOWN}), Communication(2e-6, 0.05)
    steps = [
        HomogeneousStep(ReplicaShape(1, pp), 16 // pp, SequenceBatch(1, length), 16)
        for pp in (1, 2, 4, 8)
        for length in (1024, 4096)
    ]
    measured = [predicted_step_s(ReplicaTimes(layer_times, 32, truth), step) for step in steps]
    found = fit_communication(layer_times, 32, steps, measured)
    assert found.transfer_s_per_token == pytest.approx(2e-6, rel=0.03)
    assert found.sync_s == pytest.approx(0.05, rel=0.05)
    with pytest.raises(ConfigError, match="unknown"):
        fit_communication(layer_times, 32, steps, measured, ("latency",))

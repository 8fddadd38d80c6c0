"""What captured hTasks hold of a GPU, by its allocator, and what happens when that is too much."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from muxtune.cost.shapes import ModelShape
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.types import EventKind, HTask
from tests.runtime.runtime_helpers import Bench, make_htask, make_plan, make_task, worst_gap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = ModelShape("tiny", 4, 512, 8, 8, 64, 1376, 1024)  # some 70 kB a row
LENGTHS = {"num_steps": 12, "max_length_tokens": 60, "rank": 16}
SMALL, LARGE = make_task("small", **LENGTHS), make_task("large", **LENGTHS)


@pytest.fixture(scope="module")
def store() -> BackboneStore:
    return BackboneStore({"tiny": random_weights(SHAPE)}, "cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def small_and_large() -> tuple[HTask, HTask]:
    return make_htask([SMALL], 64, 32), make_htask([LARGE], 64, 128)


def held_bytes(bench: Bench) -> int:
    return bench.executor._idle_bytes()


def test_a_larger_pass_takes_the_place_of_smaller_ones(
    store: BackboneStore, tmp_path: Path
) -> None:
    """All graphs hold no more than the largest needs, whichever came first; no bit changes."""
    small, large = small_and_large()
    at_once = Bench(tmp_path / "at once", store)
    at_once.run(make_plan([small, large]), SMALL, LARGE)
    wanted, weights = held_bytes(at_once), [at_once.weights(task) for task in (SMALL, LARGE)]
    at_once.executor.stop("i0")
    bench = Bench(tmp_path / "one by one", store)
    bench.prepare(SMALL, LARGE)
    bench.executor.apply(make_plan([small]))
    bench.until_step(SMALL, 3)
    assert 0 < held_bytes(bench) < 0.5 * wanted
    bench.executor.apply(make_plan([small, large], 1))
    bench.until_ended(SMALL, LARGE)
    assert held_bytes(bench) <= 1.05 * wanted
    assert bench.done() == {"small", "large"} and not bench.recorder.notices
    for task, alone in zip((SMALL, LARGE), weights, strict=True):
        assert worst_gap(bench.weights(task), alone) == 0.0


def test_a_plan_that_answers_pressure_holds_no_more_than_it_needs(
    store: BackboneStore, tmp_path: Path
) -> None:
    """Slots stay, and so their pools; the memory of the larger passes does not."""
    small, large = small_and_large()
    bench = Bench(tmp_path, store)
    bench.prepare(SMALL, LARGE)
    bench.executor.apply(make_plan([small, large]))
    bench.until_step(LARGE, 3)
    wanted = held_bytes(bench)
    bench.executor._instances["i0"].press()
    bench.executor.apply(make_plan([small, make_htask([LARGE], 64, 32)], 1))
    bench.until_step(LARGE, 6)
    assert 0 < held_bytes(bench) < 0.5 * wanted
    bench.until_ended(SMALL, LARGE)
    assert bench.done() == {"small", "large"} and not bench.recorder.notices


def test_a_plan_that_does_not_fit_loses_no_task(store: BackboneStore, tmp_path: Path) -> None:
    """The allocator fails while the larger pass is tried; what it had is free for a smaller one."""
    tasks = [SMALL, LARGE]
    plans = [make_plan([make_htask(tasks, 64, quota)], at) for at, quota in enumerate((16, 256))]
    calm = Bench(tmp_path / "calm", store)
    calm.run(plans[0], *tasks)
    weights, pass_bytes = [calm.weights(task) for task in tasks], held_bytes(calm)
    calm.executor.stop("i0")
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 3 * pass_bytes + (200 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total)
    bench = Bench(tmp_path / "full", store)
    bench.prepare(*tasks)
    bench.executor.apply(plans[1]._replace(epoch=0))
    bench.until(EventKind.MEMORY_PRESSURE, 1)
    assert bench.of(EventKind.PLAN_APPLIED) and not bench.executor._instances["i0"].is_runnable
    (notice,) = bench.recorder.notices
    assert "did not fit into the memory" in notice
    bench.executor.apply(plans[0]._replace(epoch=1))
    bench.until_ended(*tasks)
    assert bench.done() == {"small", "large"}
    for task, alone in zip(tasks, weights, strict=True):
        assert worst_gap(bench.weights(task), alone) == 0.0

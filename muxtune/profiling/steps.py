"""Whole steps of a plan on the real runners, timed.

A few of them calibrate how single operations add up to a step (``muxtune.cost.calibration``); the
validation's suite is made of others. Both go through the code that trains: the same pools, the
same captured or eager runners, the same layout of micro-batches.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from muxtune.cost.schema import CAPTURED
from muxtune.cost.shapes import ModelShape
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.profiling.step_cases import StepTask
from muxtune.protocols import LengthSource
from muxtune.runtime.adapters.low_rank import A, B
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.bank import (
    AdapterBank,
    AdapterPool,
    TaskState,
    TaskTensors,
    adapter_slot,
    drop,
    grad_dtype_for,
)
from muxtune.runtime.batch import place_task
from muxtune.runtime.memory import MemoryMeter, give_back_freed, quick_collections
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.pass_runner import PassRunner, PassWork, PendingPass
from muxtune.runtime.runners import Runners
from muxtune.types import (
    AdapterSlot,
    Cursor,
    HTask,
    MicroBatch,
    PassLoad,
    Plan,
    ShapeKey,
    TaskSpec,
)
from muxtune.workload.random_texts import RandomTexts

MAX_ROUNDS = 4
MIN_PASSES = 3


class PlannedCase(Protocol):
    """What runs: a plan and its tasks."""

    def plan(self) -> Plan: ...

    def specs(self) -> dict[str, TaskSpec]: ...


class StepMeasurement(NamedTuple):
    """``repeats_s``: seconds of the same passes, again and again. ``loads``: of these passes.
    ``peak_bytes``: above what the process held besides the weights; on a GPU, the allocator's.
    ``capture_s``: by rows of a captured size."""

    repeats_s: tuple[float, ...]
    loads: tuple[PassLoad, ...]
    num_rounds: int
    effective_tokens: int
    peak_bytes: int
    capture_s: dict[int, float]
    setup_s: float


@contextlib.contextmanager
def short_collections() -> Iterator[None]:
    """Garbage is looked for in what is new: what was imported is none, and takes most time."""
    with contextlib.suppress(ImportError):
        import transformers.models.llama.modeling_llama  # noqa: F401 (so that it is here already)
    with quick_collections():
        yield


def is_lost(device: torch.device) -> bool:
    """Whether a GPU refuses all further work of this process, after an error of a kernel."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


class NotCaptured(Exception):
    """The runtime would have run eagerly; the message says why."""


class StepBench:
    """One base model with random weights, on which step cases run one after another."""

    def __init__(
        self,
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        step: str = "auto",
        deterministic: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.shape, self.device, self._clock = shape, device, clock
        self._give_back()
        self._others_bytes = 0 if device.type == "cuda" else MemoryMeter(device).current_bytes()
        weights = {shape.name: random_weights(shape, 0, device, dtype)}
        self.store = BackboneStore(weights, device, dtype)
        self.backbone = self.store.get(shape.name)
        self.options = TorchOptions(Path(), deterministic=deterministic, step=step)
        self._notices: list[str] = []
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def close(self) -> None:
        """Let the model go; nothing can run after that."""
        del self.backbone, self.store
        self._give_back()

    def run(
        self, case: PlannedCase, budget_s: float = 2.0, min_repeats: int = 3
    ) -> StepMeasurement:
        """``min_repeats``: 0 prepares everything and runs nothing.

        Raises what the runtime raises, and NotCaptured where captured steps were asked for but
        cannot be had; the bench can go on with another case.
        """
        self._give_back()  # what an error before held on to
        try:
            with self._on_stream():
                return self._run(case, budget_s, min_repeats)
        finally:
            self._give_back()

    def _on_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._stream is None else _stream(self._stream)

    def _empty_bank(self) -> tuple[AdapterBank, Runners]:
        runners = Runners(self.backbone, self.options, self._notices.append)
        grad_dtype = grad_dtype_for(self.device, self.options.deterministic)
        return AdapterBank(self.backbone, grad_dtype, runners), runners

    def _give_back(self) -> None:
        """Freed memory to the system, so that the next peak does not contain it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return
        give_back_freed()

    def _run(self, case: PlannedCase, budget_s: float, min_repeats: int) -> StepMeasurement:
        start_s = time.perf_counter()
        meter = MemoryMeter(self.device)
        self._notices.clear()
        bank, runners = self._empty_bank()
        library, plan, specs = RandomTexts(self.shape.vocab), case.plan(), case.specs()
        states = {
            key: blank_state(bank, spec, library.add(spec).num_steps) for key, spec in specs.items()
        }
        ready, pools = _arranged(bank, runners, plan, states)
        if self.options.step == CAPTURED and not all(runner.depth for runner in ready):
            raise NotCaptured("; ".join(self._notices))
        _draw(states.values())
        num_rounds, batches = whole_rounds(plan, library, StepBuilder())
        works = [(batch.htask, _work(batch, pools[batch.htask], library)) for batch in batches]
        repeats, ready_s = self._repeated(ready, works, budget_s, min_repeats)
        setup_s = ready_s - start_s
        peak = meter.peak_bytes() - self._others_bytes
        captured = [runner for runner in ready if runner.depth]
        sizes = {
            rows: seconds
            for runner in captured
            for rows, seconds in runner.steps.capture_s.items()  # type: ignore[attr-defined]
        }
        # Nobody wants the tasks back, whose copies to the host would take longer than the steps.
        del states, ready, pools
        runners.keep([])
        return StepMeasurement(
            tuple(repeats),
            tuple(pass_load(batch, library) for batch in batches),
            num_rounds,
            sum(len(p.sequence.tokens) for _, w in works for ps in w.placed.values() for p in ps),
            peak,
            sizes,
            setup_s,
        )

    def joins(self, rank: int, repeats: int = 3) -> tuple[int, list[float]]:
        """(trained numbers, seconds from a task's specification to its place in a pool)."""
        spec = StepTask(rank=rank).spec("new", self.shape.name, 0)
        htask = plan_of_one(adapter_slot(spec))
        seconds = []
        with self._on_stream():
            bank, _ = self._empty_bank()
            bank.arrange([htask], {})  # the pool is there, as where tasks join others
            for _ in range(repeats):
                start_s = self._clock()
                state = bank.create(spec, 1)
                bank.arrange([htask], {"new": state})
                seconds.append(self._since(start_s))
                numbers = _num_trained(state)
                drop(state)
        return numbers, seconds

    def moves(self, rank: int, repeats: int = 3) -> tuple[int, list[float]]:
        """(trained numbers, seconds that a task takes from one pool to another)."""
        spec = StepTask(rank=rank).spec("new", self.shape.name, 0)
        slot = adapter_slot(spec)
        alone, beside = plan_of_one(slot), plan_of_one(slot, slot)
        seconds = []
        with self._on_stream():
            bank, _ = self._empty_bank()
            state = blank_state(bank, spec, 1)
            bank.arrange([alone], {"new": state})
            for number in range(repeats):
                start_s = self._clock()
                bank.arrange([alone if number % 2 else beside], {"new": state})
                seconds.append(self._since(start_s))
            numbers = _num_trained(state)
            drop(state)
        return numbers, seconds

    def _since(self, start_s: float) -> float:
        """Seconds, with what the device still has to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self._clock() - start_s

    def _repeated(
        self,
        runners: Sequence[PassRunner],
        works: Sequence[tuple[int, PassWork]],
        budget_s: float,
        min_repeats: int,
    ) -> tuple[list[float], float]:
        """(seconds of all passes, again and again without a pause, as in training, when the first
        time was over by ``time.perf_counter``: it warms up, and compiles what is not there yet)."""
        ends = self._ends(runners, works)
        if not min_repeats:
            return [], time.perf_counter()
        last_s, ready_s, repeats = next(ends), time.perf_counter(), []
        end_s = ready_s + budget_s
        while len(repeats) < min_repeats or (time.perf_counter() < end_s and len(repeats) < 16):
            now_s = next(ends)
            repeats.append(now_s - last_s)
            last_s = now_s
        ends.close()  # reads what was started ahead
        return repeats, ready_s

    def _ends(
        self, runners: Sequence[PassRunner], works: Sequence[tuple[int, PassWork]]
    ) -> Generator[float, None, None]:
        """When the last of the passes was over, each time; each is started ahead of results as far
        as its runner allows, so that the device has no pause between two times either."""
        started: deque[tuple[int, PendingPass]] = deque()
        try:
            for number in itertools.count():
                htask, work = works[number % len(works)]
                started.append((number, runners[htask].start(work, lambda _name: None)))
                while len(started) > runners[htask].depth:
                    first, pending = started.popleft()
                    pending.result()
                    if (first + 1) % len(works) == 0:
                        yield self._clock()
        finally:
            while started:
                started.popleft()[1].result()


def blank_state(bank: AdapterBank, spec: TaskSpec, num_steps: int) -> TaskState:
    """A fresh task; LoRA's factors are zeros, made on the device by the thousandth of the time
    that PEFT's initial values take."""
    if spec.adapter.method != "lora":
        return bank.create(spec, num_steps)
    zero = torch.zeros((), device=bank.backbone.device)
    none = zero.to(bank.grad_dtype)
    tensors = {}
    for site in bank.backbone.matching_sites(spec.adapter.targets):
        for name, width in ((A, site.in_features), (B, site.out_features)):
            size = (spec.adapter.rank, width)
            nothing = zero.expand(size)
            tensors[site.name, name] = TaskTensors(nothing, none.expand(size), nothing, nothing)
    return TaskState(spec, adapter_slot(spec), num_steps, tensors)


def plan_of_one(*slots: AdapterSlot) -> HTask:
    """The task ``new`` in the first of these slots."""
    return HTask((ShapeKey(64, len(slots), slots),), {"new": 0}, {"new": 1})


def _arranged(
    bank: AdapterBank, runners: Runners, plan: Plan, states: dict[str, TaskState]
) -> tuple[list[PassRunner], list[AdapterPool]]:
    """A slot set that cannot be captured gets pools of another kind at the second try."""
    for _ in range(len(plan.htasks) + 1):
        pools = bank.arrange(plan.htasks, states)
        try:
            return runners.arrange(plan.htasks, pools), pools
        except Runners.Refused:
            bank.arrange((), {})
    raise RuntimeError("the runtime refused every kind of pool")


@torch.no_grad()
def _draw(states: Iterable[TaskState]) -> None:
    """Weights that are no zeros, which a GPU computes with at less power, so faster."""
    for state in states:
        for key, tensors in state.tensors.items():
            if state.task.adapter.method == "lora" and state.place is not None:
                tensors.param.normal_(0.0, 0.02 if key[1] == A else 1e-3)


def whole_rounds(
    plan: Plan, library: LengthSource, builder: StepBuilder
) -> tuple[int, list[MicroBatch]]:
    """As many as give enough passes."""
    batches: list[MicroBatch] = []
    cursors = {task_id: Cursor() for task_id in plan.task_ids}
    num_rounds = 0
    while num_rounds < MAX_ROUNDS and len(batches) < MIN_PASSES:
        num_rounds += 1
        micro_batches, after = builder.next_round(plan, cursors, library)
        batches += micro_batches
        cursors = dict(after)
    return num_rounds, batches


def _work(batch: MicroBatch, pool: AdapterPool, library: RandomTexts) -> PassWork:
    slots = {
        state.task.task_id: slot for slot, state in enumerate(pool.occupants) if state is not None
    }
    slot_of = {task_id: slots[task_id] for task_id in batch.steps}
    placed = {task_id: place_task(batch, task_id, library, slot_of) for task_id in slot_of}
    closing = tuple(task_id for task_id in slot_of if task_id in batch.closes_step)
    return PassWork(batch, {key: items for key, items in placed.items() if items}, slot_of, closing)


def _num_trained(state: TaskState) -> int:
    return sum(tensors.param.numel() for tensors in state.tensors.values())


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    with torch.cuda.stream(stream):
        yield

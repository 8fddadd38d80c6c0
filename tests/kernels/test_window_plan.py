"""Launches of the linear with windows, recorded and repeated by address; nothing is computed."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from muxtune_kernels import launching, slot_rows
from muxtune_kernels.launching import TensorDescriptor
from muxtune_kernels.multi_lora import launch, tuning, window, window_op, window_tape


class Recorder:
    """Stands for every kernel, and for the C functions at the end of their launches."""

    pre_run_hooks = ()
    function = packed_metadata = None

    def __init__(self) -> None:
        self.compiled = 0
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        def call(*_: Any, **__: Any) -> "Recorder":
            self.compiled += 1
            return self

        return call

    def run(self, *arguments: Any) -> None:
        self.calls.append((*arguments[:4], *arguments[9:]))

    def short_way(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    def taken(self) -> list[Any]:
        """The calls since the last time, with addresses by the order in which they were met."""
        met: dict[int, str] = {}

        def named(value: Any) -> Any:
            if isinstance(value, TensorDescriptor):
                shapes = (value.shape, value.strides, value.block_shape)
                return named(value.base.data_ptr()), *map(tuple, shapes)
            if isinstance(value, tuple):
                return tuple(named(item) for item in value)
            is_address = isinstance(value, int) and value > 1 << 24
            return met.setdefault(value, f"buffer {len(met)}") if is_address else value

        calls, self.calls = self.calls, []
        return [named(call) for call in calls]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    for module in (launching, window):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    for found in (*vars(launch).values(), *vars(window).values()):
        if isinstance(found, launching.Launcher):
            for name, value in (("_is_known", True), ("_kernel", made), ("_known", {})):
                monkeypatch.setattr(found, name, value)
    monkeypatch.setattr(window, "window_linear_kernel", made)
    monkeypatch.setattr(window, "INTERPRETED", False)
    for module, name in ((window, "_compiled"), (window_op, "_plans")):
        monkeypatch.setattr(module, name, {})
    for module in (launching, window_tape):
        monkeypatch.setattr(module, "make_tensordesc_arg", lambda descriptor, _: [descriptor])
    monkeypatch.setattr(
        launching, "_entry_of",
        lambda _, count: launching._Entry(made.short_way, (), ({},) * count, False),
    )  # fmt: skip
    monkeypatch.setattr(
        window_tape.Operand, "descriptor",
        lambda self: (2, (self.own.data_ptr(), self.ranks.data_ptr(), self.tile)),
    )  # fmt: skip
    empty, kept = torch.empty, []  # no address is given twice: buffers are told apart by it

    def kept_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        kept.append(empty(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(torch, "empty", kept_empty)
    with tuning.counting_on(132):
        yield made


@pytest.mark.parametrize("num_slots", [1, 4])
def test_what_is_repeated_is_what_was_launched(recorder: Recorder, num_slots: int) -> None:
    """One slot's rows are cut into pieces, which are added up by two launches more."""
    cpu, ranks = torch.device("cpu"), (16,) * num_slots
    linear = window_op.linear_with_windows(torch.zeros(512, 256).bfloat16(), ranks)
    spans = [(slot, 64 * slot, 64 * slot + 64) for slot in range(num_slots)]
    slots = slot_rows(spans, 64 * num_slots, num_slots, cpu)
    rows = window_op.rows_with_windows(slots, torch.ones(num_slots), linear)

    def call(kept: list[Any]) -> list[Any]:
        x, dy = (torch.zeros(64 * num_slots, n).bfloat16() for n in (256, 512))
        a, b_RO = (torch.zeros(16 * num_slots, n, requires_grad=True) for n in (256, 512))
        y = window_op.multi_lora_linear_with_windows(x.requires_grad_(), a, b_RO, linear, rows)
        grads = torch.autograd.grad(y, (x, a, b_RO), dy)
        assert [grad.shape for grad in grads] == [x.shape, a.shape, b_RO.shape]
        kept += x, dy, a, b_RO, y, *grads  # so that the next call's lie elsewhere
        return recorder.taken()

    kept: list[Any] = []
    call(kept)
    compiled = recorder.compiled
    launched = call(kept)
    assert all(isinstance(plan, launching.Plan) for plan in window_op._plans.values())
    assert len(launched) == (6 if num_slots == 4 else 8)
    for _ in range(2):
        assert call(kept) == launched
    assert recorder.compiled == compiled


def test_other_rows_are_another_plan(recorder: Recorder) -> None:
    linear = window_op.linear_with_windows(torch.zeros(256, 256).bfloat16(), (16,))
    x, a = torch.zeros(64, 256).bfloat16(), torch.zeros(16, 256)
    for stop in (64, 48):
        slots = slot_rows([(0, 0, stop)], stop, 1, torch.device("cpu"))
        rows = window_op.rows_with_windows(slots, torch.ones(1), linear)
        if stop == 64:
            for _ in range(3):
                window_op.multi_lora_linear_with_windows(x, a, a, linear, rows)
            continue
        with pytest.raises(ValueError, match="x_TD"):
            window_op.multi_lora_linear_with_windows(x, a, a, linear, rows)

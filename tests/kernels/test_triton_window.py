"""The form whose ranks are a few more reduced features of the product, against the reference."""

# Tests read optional fields that they have just filled.
# pyright: reportArgumentType=false, reportOptionalSubscript=false

import pytest
import torch

from muxtune_kernels import slot_rows
from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_triton_linear import (
    Problem,
    Tensors,
    error,
    poisoned_allocations,  # noqa: F401  (used by all tests here)
    reference,
    tensors_of,
)

DENSE = "more than a window in a tile, an empty slot, one without ranks, filler"
PROBLEMS = {
    DENSE: Problem(
        (16, 16, 16, 16, 16, 0, 4, 17),
        (*((s, 24 * s, 24 * s + 24) for s in range(5)), (5, 120, 125), (7, 130, 190)),
        195, 128, (320,),
    ),
    "group of scattered rows, slots out of order": Problem(
        (40, 48, 3),
        ((2, 0, 5), *((i % 2, 5 + 3 * i, 5 + 3 * i + 2) for i in range(43))),
        139, 256, (256, 256),
    ),
    "one slot, whose rows are cut into pieces": Problem((16,), ((0, 0, 600),), 601, 64, (128,)),
}  # fmt: skip


def window_form(problem: Problem, t: Tensors):
    """(y, dx, dA, dB); the buffers beside x and dy are full of NaN."""
    from muxtune_kernels.multi_lora import window

    ranks, device = problem.ranks, t.x.device
    linear = window.linear_with_windows(t.weight, ranks, problem.out)
    slots = slot_rows(problem.spans, problem.num_rows, len(ranks), device)
    rows = window.rows_with_windows(slots, t.scale, linear)
    b_RO = t.b.t().contiguous()
    linear.refresh(t.a, b_RO)
    y_TO, h_TJ = linear.forward(t.x, rows)
    dx_TD, da_RD, db_RO = linear.backward(t.dy, t.x, h_TJ, t.a, b_RO, rows)
    return y_TO, dx_TD, da_RD, db_RO.t()


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_window_of_ranks(name: str, device: torch.device) -> None:
    problem = PROBLEMS[name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    t = tensors_of(problem, device, dtype, torch.float32)
    for got, wanted in zip(window_form(problem, t), reference(problem, t), strict=True):
        assert error(got, wanted) < (2e-6 if device.type == "cpu" else 8e-3)


def test_under_autograd_it_is_the_same_each_time(device: torch.device) -> None:
    """The first calls are Triton's own, later ones are recorded, then repeated; elsewhere."""
    from muxtune_kernels.multi_lora import window_op

    problem = PROBLEMS["one slot, whose rows are cut into pieces"]
    is_cpu = device.type == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    t = tensors_of(problem, device, dtype, torch.float32)
    wanted = window_form(problem, t)
    linear = window_op.linear_with_windows(t.weight, problem.ranks, problem.out)
    slots = slot_rows(problem.spans, problem.num_rows, len(problem.ranks), device)
    rows = window_op.rows_with_windows(slots, t.scale, linear)
    kept = []  # so that every call's tensors lie elsewhere
    for _ in range(1 if is_cpu else 6):
        x, a = t.x.clone().requires_grad_(), t.a.clone().requires_grad_()
        b_RO = t.b.t().contiguous().requires_grad_()
        linear.refresh(a.detach(), b_RO.detach())
        y = window_op.multi_lora_linear_with_windows(x, a, b_RO, linear, rows)
        dx, da, db = torch.autograd.grad(y, (x, a, b_RO), t.dy)
        assert all(map(torch.equal, (y, dx, da, db.t()), wanted))
        kept.append((x, a, y, dx))
    if not is_cpu:
        assert any(isinstance(plan, window_op.Plan) for plan in window_op._plans.values())


def test_what_does_not_fit_is_refused() -> None:
    from muxtune_kernels.multi_lora import launch, window, window_op

    weight = torch.zeros(128, 64)
    linear = window_op.linear_with_windows(weight, (16,))
    slots = slot_rows([(0, 0, 4)], 4, 1, torch.device("cpu"))
    rows = window.RowsWithWindows(
        launch.RowTensors(slots.slot_of_row_T, slots.slot_bounds_S3, torch.ones(1), None),
        window.Window(torch.zeros(1, 2, dtype=torch.int32), 64),
    )
    good = {"x_TD": torch.zeros(4, 64), "a_RD": torch.zeros(16, 64), "b_RO": torch.zeros(16, 128)}
    for name, bad in (
        ("x_TD", torch.zeros(5, 64)), ("x_TD", torch.zeros(4, 64).bfloat16()),
        ("a_RD", torch.zeros(32, 64)), ("b_RO", torch.zeros(128, 16)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            window_op.multi_lora_linear_with_windows(
                **(good | {name: bad}), linear=linear, rows=rows
            )
    with pytest.raises(ValueError, match="not as wide as"):
        window_op.linear_with_windows(weight, (16,), (64,))


def test_nan_stays_in_its_slot(device: torch.device) -> None:
    problem = Problem((30, 3, 40), ((0, 0, 21), (1, 21, 40), (2, 40, 60)), 64, 128, (128,))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    own_T, own_R = torch.ones(64, dtype=torch.bool), torch.ones(73, dtype=torch.bool)
    own_T[21:40], own_R[30:33] = False, False

    def run(poisoned: bool):
        t = tensors_of(problem, device, dtype, torch.float32)
        if poisoned:
            for target in (t.x[30:33], t.a[30:32], t.b[:, 31:32]):
                target[..., -1:] = float("nan")
            t.dy[30] = float("inf")
        y, dx, da, db = window_form(problem, t)
        return [y[own_T], dx[own_T], da[own_R], db[:, own_R]], y

    (clean, _), (dirty, y) = run(False), run(True)
    assert all(torch.equal(p, q) for p, q in zip(clean, dirty, strict=True))
    assert not y[21:40].isfinite().any()


@pytest.mark.skipif(INTERPRETED is False, reason="runs in test_interpreter.py's subprocess")
def test_a_window_begins_where_the_copy_engine_can() -> None:
    """At 16 bytes: elsewhere an H100 says that it has met an illegal instruction."""
    from muxtune_kernels.multi_lora import window

    cpu = torch.device("cpu")
    linear = window.linear_with_windows(torch.zeros(256, 256), (3, 4, 17, 70))
    rows = slot_rows([(s, 128 * s, 128 * s + 128) for s in range(4)], 512, 4, cpu)
    table_I2 = window.rows_with_windows(rows, torch.ones(4), linear).window.table_I2
    assert table_I2.tolist() == [[0, 1], [0, 1], [0, 1], [24, 2]]


def test_features_that_the_copy_engine_cannot_read_are_refused() -> None:
    from muxtune_kernels.multi_lora import window

    for ranks, num_out, members in (
        ((40,), 72, None), ((40,), 320, (192, 128)), ((40, 40), 128, None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="use multi_lora_linear_group"):
            window.linear_with_windows(torch.zeros(num_out, 64), ranks, members)

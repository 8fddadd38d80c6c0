"""The form whose ranks are a few more reduced features of the product, against the reference."""

# Tests read optional fields that they have just filled.
# pyright: reportArgumentType=false, reportOptionalSubscript=false

import pytest
import torch

from muxtune_kernels import slot_rows
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
        195, 64, (320,),
    ),
    "group of scattered rows, slots out of order": Problem(
        (40, 48, 3),
        ((2, 0, 5), *((i % 2, 5 + 3 * i, 5 + 3 * i + 2) for i in range(43))),
        139, 64, (256, 256),
    ),
}  # fmt: skip


def window_form(problem: Problem, t: Tensors):
    """(y, dx, dA, dB); room behind x and dy is full of NaN."""
    from muxtune_kernels.multi_lora import room

    device, ranks = t.x.device, problem.ranks
    linear = room.linear_with_room(t.weight, ranks, problem.out)
    assert isinstance(linear.weight, room.window.WideWeight)
    slots = slot_rows(problem.spans, problem.num_rows, len(ranks), device)
    rows = room.rows_with_room(slots, t.scale, linear)
    b_RO = t.b.t().contiguous()
    linear.refresh(t.a, b_RO)
    x_TW, dy_TW = (
        linear.buffer_of(problem.num_rows, is_dy).fill_(float("nan")) for is_dy in (False, True)
    )
    x_TW[:, : problem.width], dy_TW[:, : sum(problem.out)] = t.x, t.dy
    y_TO, h_TJ = linear.forward(x_TW, rows)
    dx_TD, da_RD, db_RO = linear.backward(dy_TW, x_TW, h_TJ, t.a, b_RO, rows)
    assert rows.window.count == 0  # cleared for the next call
    return y_TO, dx_TD, da_RD, db_RO.t()


@pytest.mark.parametrize(("name", "beside"), [(name, True) for name in PROBLEMS] + [(DENSE, False)])
def test_a_window_of_ranks(name: str, beside: bool, device: torch.device, monkeypatch) -> None:
    """beside: dA is made by the product's kernel."""
    from muxtune_kernels.multi_lora import window

    monkeypatch.setattr(window, "makes_outer_beside", lambda *_: beside)
    problem = PROBLEMS[name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    t = tensors_of(problem, device, dtype, torch.float32)
    for got, wanted in zip(window_form(problem, t), reference(problem, t), strict=True):
        assert error(got, wanted) < (2e-6 if device.type == "cpu" else 8e-3)


def test_nan_stays_in_its_slot(device: torch.device) -> None:
    problem = Problem((30, 3, 40), ((0, 0, 21), (1, 21, 40), (2, 40, 60)), 64, 64, (128,))
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


def test_features_that_the_copy_engine_cannot_read_are_refused() -> None:
    from muxtune_kernels.multi_lora import room

    for num_out, members in ((72, None), (320, (192, 128))):
        with pytest.raises(ValueError, match=f"64 features to .*{num_out if not members else 192}"):
            room.linear_with_room(torch.zeros(num_out, 64), (40, 40), members)

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

PROBLEMS = {
    "more than a window in a tile, an empty slot, one without ranks, filler": Problem(
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


def window_form(problem: Problem, t: Tensors, sides: bool = True):
    """(y, dx, dA, dB); room behind x and dy is full of NaN."""
    from muxtune_kernels.multi_lora import launch, window

    device, ranks = t.x.device, problem.ranks
    slots = slot_rows(problem.spans, problem.num_rows, len(ranks), device)
    rows = launch.RowTensors(slots.slot_of_row_T, slots.slot_bounds_S3, t.scale, None)
    adapters = launch.Adapters(ranks, problem.out)
    tuning = window.window_tuning(
        problem.num_rows, problem.width, problem.out, len(ranks),
        launch.layout_of(adapters, device).rank_pad, t.x.element_size(),
    )  # fmt: skip
    weight, b_RO = window.wide_weight(t.weight, adapters), t.b.t().contiguous()
    window.widen_weight(weight, t.a, b_RO, adapters)
    place = window.window_of(rows, adapters)
    room = len(problem.out) * place.room
    x_TW, dy_TW = (
        window.wide_buffer(len(v), v.shape[1], room, v).fill_(float("nan")) for v in (t.x, t.dy)
    )
    x_TW[:, : problem.width], dy_TW[:, : weight.num_out] = t.x, t.dy
    forward = window.blocks_of(problem.num_rows, problem.width, weight.num_out, len(ranks))
    # The first tile ahead, the second beside; or all ahead.
    forward = forward._replace(programs=3, side=int(sides), ahead=1)
    y_TO, h_TJ = window.window_forward(x_TW, weight, rows, place, adapters, tuning, forward)
    assert not place.ready_I.any()  # cleared for the next call
    dx_TD, da_RD, db_RO = window.window_backward(
        dy_TW, x_TW, h_TJ, weight, t.a, b_RO, rows, place, adapters, tuning, None, sides
    )
    assert not place.ready_I.any()
    return y_TO, dx_TD, da_RD, db_RO.t()


@pytest.mark.parametrize("sides", [True, False])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_window_of_ranks(name: str, sides: bool, device: torch.device) -> None:
    problem = PROBLEMS[name]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    t = tensors_of(problem, device, dtype, torch.float32)
    for got, wanted in zip(window_form(problem, t, sides), reference(problem, t), strict=True):
        assert error(got, wanted) < (2e-6 if device.type == "cpu" else 8e-3)


def test_nan_stays_in_its_slot(device: torch.device) -> None:
    problem = Problem((4, 3, 8), ((0, 0, 21), (1, 21, 40), (2, 40, 60)), 64, 64, (128,))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    own = torch.ones(64, dtype=torch.bool)
    own[21:40] = False

    def run(poisoned: bool):
        t = tensors_of(problem, device, dtype, torch.float32)
        if poisoned:
            for target in (t.x[30:33], t.a[4:6], t.b[:, 5:6]):
                target[..., -1:] = float("nan")
            t.dy[30] = float("inf")
        y, dx, da, db = window_form(problem, t)
        return [y[own], dx[own], da[[0, 1, 2, 3, *range(7, 15)]], db[:, [0, 1, 2, 3, 7, 14]]], y

    (clean, _), (dirty, y) = run(False), run(True)
    assert all(torch.equal(p, q) for p, q in zip(clean, dirty, strict=True))
    assert not y[21:40].isfinite().any()

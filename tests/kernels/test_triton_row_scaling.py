"""Rows times their slot's vector in Triton, against autograd, and the plain form beside it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from muxtune_kernels.row_scaling import (
    SlotVectors,
    scale_slot_rows_,
    scale_slot_rows_backward_,
)

# Slot 1 owns nothing though it has room; slot 3 has no rows; slot 4 keeps what it has.
BOUNDS = [(0, 5, 5), (5, 45, 40), (45, 47, 2), (0, 0, 0), (50, 130, 80)]
SLOT_OF_VECTOR, OWNER = (1, 2, 3, 4), [4, 4, 1, 2, 3, 4]
NUM_ROWS, WIDE, COLUMNS = 140, 300, slice(7, 163)


def problem(device: torch.device) -> tuple[SlotVectors, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    width = COLUMNS.stop - COLUMNS.start
    vectors = SlotVectors(
        draw(4, width), draw(4, width), torch.tensor(SLOT_OF_VECTOR, device=device),
        torch.tensor(OWNER, device=device),
        torch.tensor(BOUNDS, dtype=torch.int32, device=device),
        torch.tensor([0, 0, 0, 0, 1], dtype=torch.int32, device=device),
    )  # fmt: skip
    return vectors, [draw(NUM_ROWS, WIDE) for _ in range(2)]


def wanted(vectors: SlotVectors, x: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    """(out, dx, gradients) by autograd, a slot at a time."""
    x_leaf, v_leaf = x.clone().requires_grad_(), vectors.vector_UW.clone().requires_grad_()
    out = x_leaf.clone()
    for vector, slot in ((1, 2), (2, 3), (3, 4)):
        rows = slice(*BOUNDS[slot][:2])
        out[rows, COLUMNS] = x_leaf[rows, COLUMNS] * v_leaf[vector]
    dx, dv = torch.autograd.grad(out, (x_leaf, v_leaf), dout)
    dv[3] += vectors.grad_UW[3]
    return [out.detach(), dx, dv]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_rows_of_owners_are_scaled_and_vectors_get_gradients(
    plain: bool, in_place: bool, device: torch.device
) -> None:
    """In place, what the rows held is kept; what is kept of other rows is anything."""
    vectors, (x, dout) = problem(device)
    expected = wanted(vectors, x, dout)
    out, dx = x.clone(), dout.clone()
    views = [tensor[:, COLUMNS] for tensor in (out, x, dx, dout)]
    if plain and device.type == "cuda":
        pytest.skip("the plain form is the CPU's")
    kept = None
    if in_place:
        kept = torch.full_like(views[1], float("nan"))
        views = [views[0], views[0], views[2], views[2]]
    if plain:
        scale_slot_rows_(views[0], views[1], vectors, kept)
        scale_slot_rows_backward_(views[2], views[3], views[1] if kept is None else kept, vectors)
    else:
        from muxtune_kernels.row_scaling.kernels import backward_, forward_

        forward_(views[0], views[1], vectors, kept)
        backward_(views[2], views[3], views[1] if kept is None else kept, vectors)
    for got, want in zip((out, dx, vectors.grad_UW), expected, strict=True):
        torch.testing.assert_close(got, want)
    # Rows and columns that are nobody's keep their bits.
    assert torch.equal(out[:45], x[:45]) and torch.equal(dx[47:50], dout[47:50])
    assert torch.equal(out[:, :7], x[:, :7]) and torch.equal(dx[:, 163:], dout[:, 163:])


def test_a_nan_stays_with_its_slot(device: torch.device) -> None:
    from muxtune_kernels.row_scaling.kernels import backward_

    vectors, (x, dout) = problem(device)
    x[46] = float("nan")  # slot 2's
    clean, grads = wanted(*problem(device)[:1], *problem(device)[1]), vectors.grad_UW
    backward_(dout.clone()[:, COLUMNS], dout[:, COLUMNS], x[:, COLUMNS], vectors)
    assert grads[1].isnan().all()
    torch.testing.assert_close(grads[[0, 2, 3]], clean[2][[0, 2, 3]])

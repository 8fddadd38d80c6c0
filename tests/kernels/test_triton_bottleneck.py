"""The Triton form of the multi-task bottleneck and of slot sums against their references."""

# Tests read gradients and optional fields that they have just filled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from typing import Any, NamedTuple

import pytest
import torch

from muxtune_kernels import RowDropout, row_keys, slot_rows
from muxtune_kernels.bottleneck import (
    BottleneckGrads,
    BottleneckPool,
    bottleneck_backward,
    bottleneck_forward,
    multi_task_bottleneck_reference,
)
from muxtune_kernels.segments import segment_sum, segment_sum_reference

RANKS = (4, 0, 17, 2)
SPANS = ((0, 0, 40), (2, 45, 90), (1, 90, 101), (3, 101, 105))
NUM_ROWS, WIDTH = 107, 70
OWNED = torch.tensor([True, False, True, True])


class Problem(NamedTuple):
    y: torch.Tensor
    parameters: list[torch.Tensor]
    dz: torch.Tensor


def problem(device, dtype=torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.25).to(device)

    rank, used = sum(RANKS), sum(r > 0 for r in RANKS)
    parameters = [
        normal(rank, WIDTH), normal(rank, 1)[:, 0], normal(rank, WIDTH), normal(used, WIDTH),
    ]  # fmt: skip
    return Problem(normal(NUM_ROWS, WIDTH).to(dtype), parameters, normal(NUM_ROWS, WIDTH).to(dtype))


def dropout(device) -> RowDropout:
    keys = row_keys(7, 1, 0, torch.arange(NUM_ROWS))
    return RowDropout(keys.to(device), torch.tensor([0.3, 0.0, 0.1, 0.5], device=device))


def rows(device):
    return slot_rows(SPANS, NUM_ROWS, len(RANKS), device)


def reference(at: Problem, drop: RowDropout | None, owned=OWNED) -> list[torch.Tensor]:
    """[z, dy, gradients of the parameters] in float64."""
    leaves = [t.detach().cpu().double().requires_grad_() for t in (at.y, *at.parameters)]
    drop = None if drop is None else RowDropout(*(part.cpu() for part in drop))
    z = multi_task_bottleneck_reference(*leaves, owned, RANKS, rows("cpu"), drop, 5)
    return [z, *torch.autograd.grad(z, leaves, at.dz.cpu().double())]


def compare(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float) -> None:
    for left, right in zip(got, want, strict=True):
        right = right.detach()
        gap = (left.detach().cpu().double() - right).norm() / right.norm()
        assert float(gap) < tolerance


@pytest.mark.parametrize("with_dropout", [False, True])
def test_forward_and_gradients(device: torch.device, with_dropout: bool) -> None:
    from muxtune_kernels.bottleneck.op import bottleneck_autograd

    at, drop = problem(device), dropout(device) if with_dropout else None
    leaves = [t.requires_grad_() for t in (at.y, *at.parameters)]
    z = bottleneck_autograd(*leaves, OWNED.to(device), RANKS, rows(device), drop, 5, True)
    grads = torch.autograd.grad(z, leaves, at.dz)
    compare([z, *grads], reference(at, drop), 2e-5)
    filler = [*range(40, 45), *range(90, 101), 105, 106]
    assert torch.equal(z[filler], at.y[filler])


def test_a_slot_that_is_not_owned_keeps_its_rows_and_gets_no_gradient(
    device: torch.device,
) -> None:
    from muxtune_kernels.bottleneck.op import bottleneck_autograd

    at = problem(device)
    for values in at.parameters[:3]:
        values[4:21] = 0  # slot 2's
    leaves = [t.requires_grad_() for t in (at.y, *at.parameters)]
    owned = torch.tensor([True, False, False, True])
    z = bottleneck_autograd(*leaves, owned.to(device), RANKS, rows(device), None, 5, True)
    grads = torch.autograd.grad(z, leaves, at.dz)
    compare([z, *grads], reference(at, None, owned), 2e-5)
    assert all(not grad[4:21].any() for grad in grads[1:4]) and not grads[4][1].any()


def test_no_nan_crosses_slots(device: torch.device) -> None:
    from muxtune_kernels.bottleneck.op import bottleneck_autograd

    kept = []
    for poison in (False, True):
        at = problem(device)
        if poison:
            for values in at.parameters[:3]:
                values[4:21] = float("nan")
            at.parameters[3][1], at.y[45:90] = float("nan"), float("nan")
        leaves = [t.requires_grad_() for t in (at.y, *at.parameters)]
        z = bottleneck_autograd(*leaves, OWNED.to(device), RANKS, rows(device), None, 5, True)
        grads = torch.autograd.grad(z, leaves, at.dz)
        others = [z[:45], z[90:], grads[0][:45], grads[0][90:]]
        others += [grad[4 * [True] + 17 * [False] + 2 * [True]] for grad in grads[1:4]]
        kept.append([*others, grads[4][[0, 2]]])
    for left, right in zip(*kept, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("where", ["reference", "device"])
def test_explicit_calls_accumulate_or_overwrite_by_slot(device: torch.device, where: str) -> None:
    """Off CUDA both are the reference's; the launched form is called by its own name."""
    from muxtune_kernels.bottleneck import explicit

    device = torch.device("cpu") if where == "reference" else device
    at, drop = problem(device), dropout(device)
    pool = BottleneckPool(*at.parameters, OWNED.to(device), RANKS, 5, True)
    forward, backward = bottleneck_forward, bottleneck_backward
    if where == "device":
        forward, backward = explicit.launched_forward, explicit.launched_backward
    targets = BottleneckGrads(*(torch.full_like(p, 2.0) for p in at.parameters))
    keep = torch.tensor([1, 0, 0, 1], dtype=torch.int32, device=device)
    z, inner = forward(at.y, pool, rows(device), drop)
    dy, _ = backward(at.dz, at.y, inner, pool, rows(device), drop, targets, keep)
    want = reference(at, drop)
    kept = torch.tensor([2.0] * 4 + [0.0] * 17 + [2.0] * 2).double()
    want[2:5] = [want[2] + kept[:, None], want[3] + kept, want[4] + kept[:, None]]
    want[5] = want[5] + torch.tensor([[2.0], [0.0], [2.0]])
    compare([z, dy, *targets], want, 2e-5)


def test_slot_sums(device: torch.device) -> None:
    from muxtune_kernels.segments.op import _launch

    values = problem(device).dz
    values[45:90] = float("nan")
    used = (1, 1, 1, 0)
    want = segment_sum_reference(values, rows(device), used)
    got = _launch(values, rows(device), used, True, None, None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert want[2].isnan().all() and not want[:2].isnan().any()
    by_hand = torch.stack([values[a:b].sum(0) for a, b in ((0, 40), (90, 101), (45, 90))])
    torch.testing.assert_close(want, by_hand, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_slot_sums_into_a_target() -> None:
    values, target = problem("cpu").dz, torch.full((2, WIDTH), 2.0)
    keep = torch.tensor([1, 0, 0, 0], dtype=torch.int32)
    got = segment_sum(values, rows("cpu"), (1, 0, 1, 0), True, target, keep)
    assert got is target
    want = torch.stack([values[:40].sum(0) + 2, values[45:90].sum(0)])
    torch.testing.assert_close(target, want, rtol=1e-5, atol=1e-5)


def test_launches_do_not_grow_with_the_slots(device: torch.device) -> None:
    """Counted under the interpreter, where every launch passes one place."""
    if device.type != "cpu":
        pytest.skip("counted under the interpreter")
    counts = [launches(count) for count in (2, 8)]
    assert counts[0] == counts[1] > 0


def launches(num_slots: int) -> int:
    from triton.runtime import interpreter

    from muxtune_kernels.bottleneck.op import bottleneck_autograd

    count, executor = 0, interpreter.GridExecutor
    run = executor.__call__

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return run(self, *args, **options)

    ranks, width = (4,) * num_slots, 32
    layout = slot_rows([(s, 4 * s, 4 * s + 4) for s in range(num_slots)], 4 * num_slots, num_slots)
    shapes = ((4 * num_slots, width), (4 * num_slots,), (4 * num_slots, width), (num_slots, width))
    leaves = [torch.ones(shape).requires_grad_() for shape in ((4 * num_slots, width), *shapes)]
    executor.__call__ = counted  # type: ignore[method-assign]
    try:
        owned = torch.ones(num_slots, dtype=torch.bool)
        z = bottleneck_autograd(*leaves, owned, ranks, layout, None, 5, True)
        z.sum().backward()
    finally:
        executor.__call__ = run  # type: ignore[method-assign]
    return count

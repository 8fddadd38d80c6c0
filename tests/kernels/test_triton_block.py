"""The Triton forms of a block's small operators against torch; gradients against autograd."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

import pytest
import torch

try:
    import triton  # noqa: F401
except ImportError:
    pytest.skip("triton is not installed", allow_module_level=True)

from muxtune_kernels.block import Heads, reference

HEADS = Heads(num_heads=4, num_kv_heads=2, head_dim=12)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def tables(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle_LP = torch.arange(positions)[:, None] * torch.linspace(0.1, 1, 6)[None]
    return angle_LP.cos(), angle_LP.sin()


@pytest.mark.parametrize("is_first", [False, True])
def test_add_rms_norm(is_first: bool, device: torch.device) -> None:
    from muxtune_kernels.block import kernels

    x, added = normal(5, 100), None if is_first else normal(5, 100, seed=1)
    weight = normal(100)
    expected = reference.add_rms_norm(x, added, weight, 1e-5)
    args = (x.to(device), None if added is None else added.to(device), weight.to(device), 1e-5)
    for got, want in zip(kernels.add_rms_norm_cuda(*args), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm_backward_is_that_of_autograd(has_residual: bool, device: torch.device) -> None:
    from muxtune_kernels.block import kernels

    x, weight, dy = normal(5, 100).requires_grad_(), normal(100), normal(5, 100, seed=2)
    y = torch.nn.functional.rms_norm(x, (100,), weight, 1e-5)
    (expected,) = torch.autograd.grad(y, x, dy)
    residual = normal(5, 100, seed=3) if has_residual else None
    expected = expected + residual if residual is not None else expected
    _, _, rstd = reference.add_rms_norm(x.detach(), None, weight, 1e-5)
    args = (dy, x.detach(), weight, rstd, residual)
    torch.testing.assert_close(reference.rms_norm_backward(*args), expected)
    moved = [None if tensor is None else tensor.to(device) for tensor in args]
    torch.testing.assert_close(kernels.rms_norm_backward_cuda(*moved).cpu(), expected)


def test_rotation_and_its_inverse(device: torch.device) -> None:
    from muxtune_kernels.block import kernels

    qkv, position = normal(7, HEADS.qkv_features), torch.tensor([0, 1, 2, 0, 1, 9, 3]).int()
    angles = tables(10)
    expected, got = qkv.clone(), qkv.clone().to(device)
    on_device = [tensor.to(device) for tensor in (*angles, position)]
    reference.rotate_(expected, *angles, position, HEADS)
    kernels.rotate_cuda_(got, *on_device, HEADS)
    torch.testing.assert_close(got.cpu(), expected)
    parts = expected.unflatten(1, (8, 12)).split((4, 2, 2), dim=1)
    back = reference.rotate_backward(*parts, *angles, position, HEADS)
    torch.testing.assert_close(back, qkv)  # a rotation's gradient is its inverse
    moved = [part.to(device) for part in parts]
    got = kernels.rotate_backward_cuda(*moved, *on_device, HEADS)
    torch.testing.assert_close(got.cpu(), qkv)


def test_swiglu(device: torch.device) -> None:
    from muxtune_kernels.block import kernels

    gate_up, dout = normal(5, 200).requires_grad_(), normal(5, 100)
    gate, up = gate_up.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    (dexpected,) = torch.autograd.grad(expected, gate_up, dout)
    plain = gate_up.detach().clone()
    torch.testing.assert_close(reference.swiglu(plain), expected)
    torch.testing.assert_close(kernels.swiglu_cuda(plain.to(device)).cpu(), expected)
    moved = plain.clone().to(device)
    torch.testing.assert_close(reference.swiglu_backward_(dout, plain.clone()), dexpected)
    got = kernels.swiglu_backward_cuda_(dout.to(device), moved)
    assert got is moved
    torch.testing.assert_close(got.cpu(), dexpected)

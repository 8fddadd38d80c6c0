"""Packed attention in Triton against torch, forward and gradients, sequence by sequence."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

import pytest
import torch

try:
    import triton  # noqa: F401
except ImportError:
    pytest.skip("triton is not installed", allow_module_level=True)

import itertools

from muxtune_kernels.block import Heads
from muxtune_kernels.packed_attention import attention_tiles, packed_attention_reference

BOUNDS = (0, 5, 69, 70, 150, 161, 300, 300, 300)  # 5, 64, 1, 80, 11 and 139 rows, two unused


def inputs(heads: Heads, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(BOUNDS[-1], heads.qkv_features, generator=generator).to(dtype)
    dout = torch.randn(BOUNDS[-1], heads.num_heads * heads.head_dim, generator=generator).to(dtype)
    half = heads.head_dim // 2
    angle = torch.arange(160)[:, None] * torch.linspace(0.01, 1, half)[None]
    lengths = [b - a for a, b in itertools.pairwise(BOUNDS)]
    position = torch.cat([torch.arange(n) for n in lengths]).int()
    return qkv, dout, angle.cos(), angle.sin(), position, torch.tensor(BOUNDS, dtype=torch.int32)


@pytest.mark.parametrize("heads", [Heads(2, 2, 32), Heads(4, 2, 32), Heads(2, 2, 128)])
def test_attention_and_its_gradient(heads: Heads, device: torch.device) -> None:
    from muxtune_kernels.packed_attention import kernels

    if device.type == "cpu" and heads.head_dim == 128:
        pytest.skip("slow under the interpreter")
    # float32 tiles of 128 features would not fit the shared memory.
    exact = heads.head_dim < 128
    dtype = torch.float32 if exact else torch.bfloat16
    qkv, dout, cos, sin, position, bounds = inputs(heads, dtype)
    leaf = qkv.double().requires_grad_() if not exact else qkv.clone().requires_grad_()
    expected = packed_attention_reference(leaf, cos, sin, position, bounds, heads)
    (dexpected,) = torch.autograd.grad(expected, leaf, dout.to(expected.dtype))
    tiles = torch.from_numpy(attention_tiles(BOUNDS, 12))
    angles = [tensor.to(device) for tensor in (cos, sin, position, tiles)]
    qkv, dout = qkv.to(device), dout.to(device)
    out, lse = kernels.forward_cuda(qkv, *angles, heads)
    dqkv = kernels.backward_cuda(dout, qkv, out, lse, *angles, heads)
    for got, want in ((out, expected), (dqkv, dexpected)):
        error = (got.cpu().double() - want.double()).norm() / want.double().norm()
        assert error < (1e-5 if exact else 8e-3)
        worst = (got.cpu().double() - want.double()).abs().max()
        assert worst < (1e-4 if exact else 0.2)


def test_a_sequence_does_not_depend_on_its_place(device: torch.device) -> None:
    from muxtune_kernels.packed_attention import kernels

    heads = Heads(2, 2, 32)
    qkv, dout, cos, sin, position, _ = (x.to(device) for x in inputs(heads, torch.float32))
    tiles = torch.from_numpy(attention_tiles(BOUNDS, 12)).to(device)
    out, lse = kernels.forward_cuda(qkv, cos, sin, position, tiles, heads)
    dqkv = kernels.backward_cuda(dout, qkv, out, lse, cos, sin, position, tiles, heads)
    rows = slice(70, 150)
    alone = torch.from_numpy(attention_tiles([0, 80], 3)).to(device)
    args = (cos, sin, position[rows].contiguous(), alone)
    out_1, lse_1 = kernels.forward_cuda(qkv[rows].contiguous(), *args, heads)
    dqkv_1 = kernels.backward_cuda(
        dout[rows].contiguous(), qkv[rows].contiguous(), out_1, lse_1, *args, heads
    )
    assert torch.equal(out_1, out[rows])
    assert torch.equal(dqkv_1, dqkv[rows])


def test_tiles_cover_every_row_once_and_the_longest_come_first() -> None:
    tiles = attention_tiles(BOUNDS, 12)
    rows = [r for start, stop, at in tiles for r in range(at, min(at + 64, stop))]
    assert sorted(rows) == list(range(300))
    assert tiles[0].tolist() == [161, 300, 161]
    with pytest.raises(ValueError, match="9 attention tiles, room for 7"):
        attention_tiles(BOUNDS, 7)

"""The reference of the multi-task low-rank linear, through the public functions on the CPU."""

# Tests read gradients and optional fields that they have just filled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false

import pytest
import torch
from torch.nn import functional

from muxtune_kernels import (
    RowDropout,
    dropout_keep_mask,
    multi_lora_linear,
    multi_lora_linear_group,
    row_keys,
    slot_rows,
)
from muxtune_kernels.multi_lora import tuning

RANKS = (3, 0, 5, 2)
SPANS = [(2, 0, 6), (0, 8, 13), (1, 13, 17)]
T, D, O, S = 19, 16, 32, 4  # noqa: E741


def tensors(dtype: torch.dtype = torch.float64, out: int = O, members: int = 1):
    torch.manual_seed(0)
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    a = torch.randn(members * sum(RANKS), D, dtype=dtype, requires_grad=True)
    b = torch.randn(out, sum(RANKS), dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(out, D, dtype=dtype), torch.randn(out, dtype=dtype)
    return x, weight, bias, a, b, torch.rand(S, dtype=torch.float32) + 0.5


def test_equals_one_task_at_a_time() -> None:
    x, weight, bias, a, b, scale = tensors()
    y = multi_lora_linear(x, weight, bias, a, b, RANKS, scale, slot_rows(SPANS, T, S))
    expected = functional.linear(x, weight, bias)
    for slot, start, stop in SPANS:
        rank = slice(sum(RANKS[:slot]), sum(RANKS[: slot + 1]))
        delta = x[start:stop] @ a[rank].T @ b[:, rank].T * scale[slot].double()
        expected = torch.cat([expected[:start], expected[start:stop] + delta, expected[stop:]])
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients(deterministic: bool) -> None:
    x, weight, bias, a, b, scale = tensors()
    rows = slot_rows(SPANS, T, S)
    dropout = RowDropout(row_keys(1, 2, 3, torch.arange(T)), torch.tensor([0.5, 0, 0.25, 0]))

    def call(x, a, b):
        return multi_lora_linear(
            x, weight, bias, a, b, RANKS, scale, rows, dropout, 9, deterministic
        )

    assert torch.autograd.gradcheck(call, (x, a, b))


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, bias, a, b, scale = tensors()
    weight.requires_grad_()
    bias.requires_grad_()
    rows = slot_rows(SPANS, T, S)
    multi_lora_linear(x, weight, bias, a, b, RANKS, scale, rows).sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert a.grad is not None


def test_dropout_is_the_published_mask() -> None:
    x, weight, _, a, b, scale = tensors()
    keys, rate = row_keys(1, 2, 3, torch.arange(T)), 0.25
    rows = slot_rows([(2, 0, T)], T, S)
    dropout = RowDropout(keys, torch.full((S,), rate))
    y = multi_lora_linear(x, weight, None, a, b, RANKS, scale, rows, dropout, 42)
    kept = torch.where(dropout_keep_mask(keys, 42, D, rate), x / (1 - rate), 0.0)
    delta = kept @ a[3:8].T @ b[:, 3:8].T * scale[2].double()
    torch.testing.assert_close(y, x @ weight.T + delta)


def test_group_equals_its_members() -> None:
    out = (16, 12, 4)
    x, weight, bias, a, b, scale = tensors(members=3)
    rows = slot_rows(SPANS, T, S)
    y = multi_lora_linear_group(x, weight, bias, a, b, out, RANKS, scale, rows)
    members = zip(weight.split(out), bias.split(out), a.chunk(3), b.split(out), strict=True)
    alone = [multi_lora_linear(x, w, c, p, q, RANKS, scale, rows) for w, c, p, q in members]
    torch.testing.assert_close(y, torch.cat(alone, 1))


def test_a_slot_does_not_notice_its_place_or_its_neighbours() -> None:
    x, weight, bias, a, b, scale = tensors(torch.float32)
    own = torch.randn(6, D)

    def run(start: int, others: list[tuple[int, int, int]]):
        rows_x = x.detach().clone()
        rows_x[start : start + 6] = own
        leaves = [rows_x.requires_grad_(), *(t.detach().clone().requires_grad_() for t in (a, b))]
        rows = slot_rows([(2, start, start + 6), *others], T, S)
        y = multi_lora_linear(
            leaves[0], weight, bias, *leaves[1:], RANKS, scale, rows, deterministic=True
        )
        (y * y).sum().backward()
        place = slice(start, start + 6)
        return y[place], leaves[0].grad[place], leaves[1].grad[3:8], leaves[2].grad[:, 3:8]

    alone, together = run(0, []), run(11, [(0, 0, 5), (3, 6, 9)])
    assert all(torch.equal(p, q) for p, q in zip(alone, together, strict=True))


@pytest.mark.parametrize("where", ["rows", "a", "b", "scale"])
def test_nan_stays_in_its_slot(where: str) -> None:
    def run(poisoned: bool):
        x, weight, bias, a, b, scale = tensors(torch.float32)
        if poisoned:
            target = {"rows": x.data[8:13], "a": a.data[:3], "b": b.data[:, :3], "scale": scale[:1]}
            target[where].fill_(float("nan"))
        y = multi_lora_linear(x, weight, bias, a, b, RANKS, scale, slot_rows(SPANS, T, S))
        y.sum().backward()
        keep = [i for i in range(T) if not 8 <= i < 13]
        return y[keep], x.grad[keep], a.grad[3:], b.grad[:, 3:]

    assert all(torch.equal(p, q) for p, q in zip(run(False), run(True), strict=True))


def test_no_task_at_all_is_the_base_linear() -> None:
    x, weight, bias, a, b, scale = tensors()
    y = multi_lora_linear(x, weight, bias, a, b, RANKS, scale, slot_rows([], T, S))
    torch.testing.assert_close(y, functional.linear(x, weight, bias))
    none = (0,) * S
    y = multi_lora_linear(x, weight, bias, a[:0], b[:, :0], none, scale, slot_rows(SPANS, T, S))
    torch.testing.assert_close(y, functional.linear(x, weight, bias))


def test_misfits_are_refused() -> None:
    x, weight, bias, a, b, scale = tensors()
    rows = slot_rows(SPANS, T, S)
    with pytest.raises(ValueError, match="a_RD"):
        multi_lora_linear(x, weight, bias, a[:-1], b, RANKS, scale, rows)
    with pytest.raises(ValueError, match="b_OR"):
        multi_lora_linear(x, weight, bias, a, b.T, RANKS, scale, rows)
    with pytest.raises(ValueError, match="slot_of_row_T"):
        multi_lora_linear(x[:-1], weight, bias, a, b, RANKS, scale, rows)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_are_found_for_any_rank(monkeypatch: pytest.MonkeyPatch, itemsize: int) -> None:
    """Those that no block fits are refused by the compiler, in words."""
    monkeypatch.setattr(tuning, "num_sms", lambda: 132)
    for rank in (16, 256, 272, 512, 1024, 4096):
        found = tuning.tuning_of.__wrapped__(2048, 4096, (4096,) * 3, 8, rank, itemsize, False)
        assert min(found.expand_n, found.shrink_k, found.db_t, found.da_t) >= 16
    assert found.expand_n == 16

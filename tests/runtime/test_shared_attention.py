"""Keys that all sequences of a slot share: their layout, the CPU form, the merged flash form."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from muxtune.runtime.attention import pack_rows, packed_attention
from muxtune.runtime.prepended import Stretches, VirtualTokens, plan_virtual, stretches_of
from muxtune.runtime.shared_attention import attend_with_shared

HEADS, KV_HEADS, FEATURES = 4, 2, 8
SCALE = FEATURES**-0.5
# Slots 0 and 2 have prefixes, 1 a prompt, 3 nothing; two rows of filler at 17.
SEQUENCES = [(0, 5), (5, 3), (8, 6), (14, 3), (19, 4), (23, 7)]
SLOTS = [0, 0, 1, 1, 3, 2]
NUM_ROWS = 30
VIRTUAL = {
    0: VirtualTokens(3, 4, False),
    1: VirtualTokens(2, 0, True),
    2: VirtualTokens(4, 0, False),
}
POOL_ROWS = 7


class Layout(NamedTuple):
    sequences: list[tuple[int, int]]
    sources: list[Any]
    plan: Any


def layout() -> Layout:
    plan = plan_virtual(VIRTUAL, SLOTS, NUM_ROWS)
    sources = [plan.sources.get(slot) for slot in SLOTS]
    return Layout([*SEQUENCES, *plan.prompts], [*sources, None], plan)


def draw(rows: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, heads, FEATURES, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def by_hand(query: Tensor, key: Tensor, value: Tensor, pools: list[Tensor]) -> Tensor:
    """Sequence by sequence, with the shared keys written out; filler rows zero."""
    sequences, sources, _ = layout()
    table_key, table_value = torch.cat([key, pools[0]]), torch.cat([value, pools[1]])
    out = torch.zeros_like(query)
    for (start, count), source in zip(sequences, sources, strict=True):
        rows = slice(start, start + count)
        keys, values, before = key[rows], value[rows], 0
        if source is not None:
            index, before = slice(source.first, source.first + source.count), source.count
            keys, values = (
                torch.cat([table_key[index], keys]),
                torch.cat([table_value[index], values]),
            )
        keys, values = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (keys, values))
        scores = torch.einsum("qhe,khe->hqk", query[rows], keys) * SCALE
        allowed = torch.ones(count, before + count).tril(before).bool()
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        out = out.index_put(
            (torch.arange(start, start + count),), torch.einsum("hqk,khe->qhe", weights, values)
        )
    return out


def test_virtual_tokens_get_rows_only_where_they_are_a_prompt() -> None:
    _, sources, plan = layout()
    assert plan.num_rows == 32 and plan.prompts == ((30, 2),) and plan.prompt_rows == (0, 1)
    assert plan.from_pools
    # The table: 32 rows of the pass, then the pool of prefixes.
    assert [source and tuple(source) for source in sources] == [
        (36, 3), (36, 3), (30, 2), (30, 2), None, (32, 4), None,
    ]  # fmt: skip
    nothing = plan_virtual(VIRTUAL, [3], NUM_ROWS)
    assert nothing.num_rows == NUM_ROWS and not nothing.sources


def test_stretches_join_neighbours_and_have_no_keys_in_gaps() -> None:
    sequences, sources, plan = layout()
    found = stretches_of(sequences, sources, plan.num_rows, "cpu")
    assert found.cu_rows.tolist() == [0, 8, 17, 19, 23, 30, 32]
    assert found.cu_keys.tolist() == [0, 3, 5, 5, 5, 9, 9]
    assert found.index.tolist() == [36, 37, 38, 30, 31, 32, 33, 34, 35]
    assert (found.max_rows, found.max_keys) == (9, 4)
    assert found.has_T.nonzero().flatten().tolist() == [*range(17), *range(23, 30)]


class Pools(NamedTuple):
    """A stand-in for what ``packed_attention`` finds at a module: fast mode, plain leaves."""

    pools: list[Tensor]

    def module(self) -> Any:
        pool = {name: part.flatten(1) for name, part in zip(NAMES, self.pools, strict=True)}
        site = type("Site", (), {"parameters": pool})
        slots = type("Slots", (), {"sites": {"here": site}})
        state = type("State", (), {"current": Current(slots)})
        return type("Module", (), {"shared_keys_site": ("here", state)})


NAMES = ("prefix_key", "prefix_value")


class Current(NamedTuple):
    pool: Any
    deterministic: bool = False

    def leaf(self, parameters: Tensor) -> Tensor:
        return parameters


def test_the_cpu_form_equals_softmax_by_hand_with_gradients() -> None:
    sequences, sources, plan = layout()
    tensors, pools = draw(plan.num_rows), draw(POOL_ROWS, seed=1)[1:]
    packed = pack_rows(sequences, plan.num_rows, "cpu", plan, sources)
    heads_first = [part.transpose(0, 1)[None] for part in tensors]
    module = Pools(pools).module()
    out = packed_attention(module, *heads_first, None, SCALE, packed=packed)[0][0]  # type: ignore[arg-type]
    compare(out, by_hand(*tensors, pools), [*tensors, *pools])  # type: ignore[arg-type]


def compare(out: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    upstream = upstream.to(out.device, out.dtype)
    got = torch.autograd.grad(out, inputs, upstream)
    want = torch.autograd.grad(expected, inputs, upstream)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def attend_merged(
    tensors: list[Tensor], pools: list[Tensor], device: str = "cpu"
) -> tuple[Tensor, Stretches]:
    sequences, sources, plan = layout()
    packed = pack_rows(sequences, plan.num_rows, device, plan, sources)
    assert packed.shared is not None and packed.filler_T is not None
    stretches = packed.shared.stretches
    shared = [
        torch.cat([own, pool]).index_select(0, stretches.index)
        for own, pool in zip(tensors[1:], pools, strict=True)
    ]
    out = attend_with_shared(
        tensors[0], tensors[1], tensors[2], shared[0], shared[1],
        packed.cu_seqlens, packed.max_seqlen, stretches, SCALE,
    )  # fmt: skip
    return out.masked_fill(packed.filler_T[:, None, None], 0), stretches


def test_two_merged_calls_equal_one_softmax() -> None:
    """The merging and its backward, with the two flash calls done by their definition."""
    tensors, pools = draw(32), draw(POOL_ROWS, seed=1)[1:]
    out, _ = attend_merged(tensors, pools)
    compare(out, by_hand(tensors[0], tensors[1], tensors[2], pools), [*tensors, *pools])


def test_what_has_no_shared_keys_keeps_its_bits_beside_a_nan() -> None:
    kept = []
    for poison in (False, True):
        tensors, pools = draw(32), draw(POOL_ROWS, seed=1)[1:]
        if poison:
            pools[0].data[4:] = float("nan")  # of slot 0
        out, _ = attend_merged(tensors, pools)
        (grad,) = torch.autograd.grad(out[8:30].sum(), tensors[0])
        kept.append((out[8:30].detach(), grad[8:30]))
        assert out[:8].isnan().all() == poison
    for left, right in zip(*kept, strict=True):
        assert torch.equal(left, right)


@pytest.mark.gpu
def test_two_merged_flash_calls_on_the_gpu() -> None:
    def on_gpu(parts: list[Tensor]) -> list[Tensor]:
        return [part.detach().cuda().bfloat16().requires_grad_() for part in parts]

    tensors, pools = on_gpu(draw(32)), on_gpu(draw(POOL_ROWS, seed=1)[1:])
    out, _ = attend_merged(tensors, pools, "cuda")
    exact = [part.detach().float().cpu().requires_grad_() for part in (*tensors, *pools)]
    expected = by_hand(exact[0], exact[1], exact[2], exact[3:])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(out, [*tensors, *pools], upstream.cuda().bfloat16())
    want = torch.autograd.grad(expected, exact, upstream.bfloat16().float())
    for left, right in zip((out, *got), (expected, *want), strict=True):
        assert float((left.float().cpu() - right).norm() / right.norm()) < 0.02

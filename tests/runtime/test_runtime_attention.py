"""Packed attention: no token sees another sequence, and filler takes no part."""

from __future__ import annotations

import itertools

import pytest
import torch

from muxtune.runtime.attention import PackedRows, pack_rows, packed_attention
from muxtune.runtime.backbone import BackboneStore

HEADS, KV_HEADS, FEATURES = 4, 2, 8
MODULE = torch.nn.Identity()


def draw(rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(1, heads, rows, FEATURES, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def reference(inputs: tuple[torch.Tensor, ...], sequences: list[tuple[int, int]]) -> torch.Tensor:
    """[1, T, H, E] by one masked softmax over all rows."""
    query, key, value = inputs
    rows = query.shape[2]
    allowed = torch.zeros(rows, rows, dtype=torch.bool)
    for start, count in sequences:
        block = torch.ones(count, count).tril().bool()
        allowed[start : start + count, start : start + count] = block
    repeat = HEADS // KV_HEADS
    key, value = (tensor.repeat_interleave(repeat, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3)) * FEATURES**-0.5
    weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1)
    return (weights.nan_to_num(0.0) @ value).transpose(1, 2)


def attend(
    inputs: tuple[torch.Tensor, ...], packed: PackedRows | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    query, key, value = inputs
    return packed_attention(MODULE, query, key, value, mask, FEATURES**-0.5, packed=packed)[0]


LAYOUTS = {
    "one length in order": [(0, 5), (5, 5), (10, 5)],
    "mixed lengths with filler": [(0, 7), (7, 3), (12, 7), (20, 1)],
    "one length apart": [(0, 4), (8, 4), (16, 4)],
    "all of one": [(0, 24)],
}


@pytest.mark.parametrize("sequences", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equals_one_masked_softmax_with_gradients(sequences: list[tuple[int, int]]) -> None:
    rows = 24 if sequences[-1][1] != 5 else 15
    inputs = draw(rows)
    packed = pack_rows(sequences, rows)
    out = attend(inputs, packed)
    expected = reference(inputs, sequences)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, inputs, upstream)
    want = torch.autograd.grad(expected, inputs, upstream)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_filler_rows_are_zero_and_pass_no_gradient() -> None:
    inputs = draw(16)
    out = attend(inputs, pack_rows([(0, 4), (9, 3)], 16))
    filler = [*range(4, 9), *range(12, 16)]
    assert torch.equal(out[0, filler], torch.zeros_like(out[0, filler]))
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert torch.equal(grad[:, :, filler], torch.zeros_like(grad[:, :, filler]))
        assert grad.abs().sum() > 0


def test_a_sequence_has_the_same_bits_wherever_it_lies() -> None:
    query, key, value = draw(9)
    alone = attend((query, key, value), pack_rows([(0, 9)], 9))
    others = draw(40, seed=5)
    with torch.no_grad():
        for tensor, mine in zip(others, (query, key, value), strict=True):
            tensor[:, :, 17:26] = mine
    packed = pack_rows([(0, 9), (9, 3), (17, 9), (30, 10)], 40)
    together = attend(others, packed)
    assert torch.equal(together[:, 17:26], alone)


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 4, 4)])
def test_refuses_what_would_leak(mask: torch.Tensor | None) -> None:
    packed = None if mask is None else pack_rows([(0, 4)], 4)
    with pytest.raises(ValueError, match="packed"):
        attend(draw(4), packed, mask)


def hidden(store: BackboneStore, ids: torch.Tensor, packed: PackedRows) -> torch.Tensor:
    backbone = store.get("tiny")
    positions = torch.zeros(len(ids), dtype=torch.int64)
    bounds = packed.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        positions[start:stop] = torch.arange(stop - start)
    with torch.no_grad():
        return backbone.hidden_TD(ids, positions, packed)


def test_changing_one_sequence_changes_no_other_in_the_whole_model(store: BackboneStore) -> None:
    ids = torch.randint(1, 128, (48,), generator=torch.Generator().manual_seed(3))
    packed = pack_rows([(0, 16), (16, 20), (36, 12)], 48)
    before = hidden(store, ids, packed)
    changed = ids.clone()
    changed[16:36] = (changed[16:36] + 7) % 128
    after = hidden(store, changed, packed)
    assert torch.equal(before[:16], after[:16])
    assert torch.equal(before[36:], after[36:])
    assert (before[16:36] != after[16:36]).any(dim=1).all()


def test_packed_logits_equal_each_sequence_alone_in_plain_transformers(
    store: BackboneStore,
) -> None:
    from transformers import LlamaForCausalLM

    backbone = store.get("tiny")
    plain = LlamaForCausalLM(backbone.model.config.__class__(**backbone.model.config.to_dict()))
    plain.set_attn_implementation("eager")
    plain.load_state_dict(backbone.model.state_dict())
    plain.eval()
    ids = torch.randint(1, 128, (30,), generator=torch.Generator().manual_seed(4))
    sequences = [(0, 11), (11, 2), (13, 17)]
    packed = hidden(store, ids, pack_rows(sequences, 30)) @ backbone.lm_head_VD.T
    for start, count in sequences:
        with torch.no_grad():
            alone = plain(ids[None, start : start + count], use_cache=False).logits[0]
        torch.testing.assert_close(packed[start : start + count], alone, rtol=1e-4, atol=1e-5)


def test_groups_of_equal_length_are_views_when_side_by_side() -> None:
    packed = pack_rows([(0, 5), (5, 5), (10, 3)], 13)
    assert [group.num_sequences for group in packed.groups] == [2, 1]
    assert packed.restore is None and packed.filler_T is None
    assert packed.cu_seqlens.tolist() == [0, 5, 10, 13]

"""Row ownership and dropout masks."""

# Tests read gradients and optional fields that they have just filled.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false, reportOptionalMemberAccess=false

import pytest
import torch

from muxtune_kernels import dropout_keep_mask, row_keys, slot_bounds, slot_rows, spans_of

SPANS = [(2, 0, 5), (0, 7, 12), (2, 12, 13)]


def test_rows_from_spans() -> None:
    rows = slot_rows(SPANS, 15, 4)
    assert rows.slot_of_row_T.tolist() == [2] * 5 + [-1] * 2 + [0] * 5 + [2] + [-1] * 2
    assert spans_of(rows.slot_of_row_T) == rows.spans == tuple(SPANS)
    assert rows.slot_bounds_S3 is not None
    assert rows.slot_bounds_S3.tolist() == [[7, 12, 5], [0, 0, 0], [0, 13, 6], [0, 0, 0]]


@pytest.mark.parametrize("spans", [[], SPANS, [(1, 3, 3), (0, 3, 9)], [(3, 0, 15)]])
def test_bounds_on_the_device_equal_those_of_the_host(spans) -> None:
    rows = slot_rows(spans, 15, 4)
    assert torch.equal(slot_bounds(rows.slot_of_row_T, 4), rows.slot_bounds_S3)


@pytest.mark.parametrize("spans", [[(0, 3, 2)], [(0, 0, 4), (1, 3, 6)], [(4, 0, 1)], [(0, 10, 16)]])
def test_bad_spans_are_refused(spans) -> None:
    with pytest.raises(ValueError, match="bad span"):
        slot_rows(spans, 15, 4)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_dropout_keeps_the_right_share_in_every_direction(rate: float) -> None:
    keys_T = row_keys(seed=7, step=3, sample=1, position=torch.arange(1500))
    keep_TD = dropout_keep_mask(keys_T, 11, 801, rate).float()
    sigma = (rate * (1 - rate)) ** 0.5
    assert abs(keep_TD.mean() - (1 - rate)) < 5 * sigma / keep_TD.numel() ** 0.5
    assert (keep_TD.mean(0) - (1 - rate)).abs().max() < 5.5 * sigma / 1500**0.5
    assert (keep_TD.mean(1) - (1 - rate)).abs().max() < 5.5 * sigma / 801**0.5


def test_dropout_masks_of_neighbours_are_uncorrelated() -> None:
    position_T = torch.arange(4000)
    masks = [
        dropout_keep_mask(row_keys(seed, step, sample, position_T), module, 64, 0.5).float()
        for seed, step, sample, module in [(1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0),
                                           (1, 0, 0, 1), (1 << 32, 0, 0, 0)]
    ]  # fmt: skip
    flat = torch.stack([mask.flatten() for mask in masks] + [masks[0].roll(1, 0).flatten()])
    flat = torch.cat([flat, masks[0].roll(1, 1).flatten()[None]])
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.01


def test_a_row_drops_the_same_wherever_it_is_packed() -> None:
    alone = dropout_keep_mask(row_keys(5, 2, 3, torch.arange(10)), 4, 33, 0.4)
    others = row_keys(6, 0, 0, torch.arange(7))
    packed = torch.cat([others, row_keys(5, 2, [3] * 10, torch.arange(10)), others])
    rate_T = torch.cat([torch.full((7,), 0.9), torch.full((10,), 0.4), torch.zeros(7)])
    mask = dropout_keep_mask(packed, 4, 33, rate_T)
    assert torch.equal(mask[7:17], alone)
    assert mask[17:].all()


def test_row_keys_are_uint32_and_repeatable() -> None:
    keys = row_keys(123456789012345, 4, torch.tensor([0, 1]), torch.tensor([5, 5]))
    assert keys.dtype == torch.int64
    assert keys.min() >= 0
    assert keys.max() < 1 << 32
    assert keys.tolist() == row_keys(123456789012345, 4, [0, 1], [5, 5]).tolist()
    assert keys[0] != keys[1]

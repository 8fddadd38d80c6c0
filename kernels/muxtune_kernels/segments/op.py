"""Sums over each slot's rows, without atomics: the outer product of the low-rank linear with ones.

Shape suffixes: T rows, W features, R pool rows (one for each slot that has any), S slots.
"""

import torch
from torch import Tensor

from ..rows import SlotRows, slot_bounds


def segment_sum(
    values_TW: Tensor,
    rows: SlotRows,
    slot_rows: tuple[int, ...],
    deterministic: bool = False,
    target_RW: Tensor | None = None,
    keep_S: Tensor | None = None,
) -> Tensor:
    """float32 [R, W]: the sum of ``values`` over the rows of each slot whose ``slot_rows`` is 1.

    slot_rows: zeros and ones, static. An empty slot gets zeros; a NaN stays with its slot.
    target_RW, keep_S: where the sums go (float32, contiguous), added for slots whose ``keep`` is
    not zero, else overwritten; the target comes back.
    """
    if sum(slot_rows) == 0:
        return values_TW.new_zeros((0, values_TW.shape[1]), dtype=torch.float32)
    if values_TW.is_cuda:
        total_RW = _launch(values_TW, rows, slot_rows, deterministic, target_RW, keep_S)
        return total_RW if target_RW is None else target_RW
    total_RW = segment_sum_reference(values_TW, rows, slot_rows)
    if target_RW is None:
        return total_RW
    assert keep_S is not None
    keeps_R = keep_S[torch.tensor([s for s, used in enumerate(slot_rows) if used])].bool()
    return target_RW.copy_(torch.where(keeps_R[:, None], target_RW + total_RW, total_RW))


def segment_sum_reference(values_TW: Tensor, rows: SlotRows, slot_rows: tuple[int, ...]) -> Tensor:
    """The same in plain torch, on any device; one op over all rows."""
    used = torch.tensor(slot_rows, device=values_TW.device)
    total = sum(slot_rows)
    # Slots without a row, and filler (-1), add to a row that is cut off.
    row_of_slot_S = torch.where(used == 1, used.cumsum(0) - 1, total)
    row_of_slot_S = torch.cat([row_of_slot_S, row_of_slot_S.new_full((1,), total)])
    row_T = row_of_slot_S[rows.slot_of_row_T.long() % row_of_slot_S.numel()]
    sums_RW = values_TW.new_zeros((total + 1, values_TW.shape[1]), dtype=torch.float32)
    return sums_RW.index_add_(0, row_T, values_TW.float())[:total]


def _launch(
    values_TW: Tensor, rows: SlotRows, slot_rows: tuple[int, ...], deterministic: bool,
    target_RW: Tensor | None, keep_S: Tensor | None,
) -> Tensor:  # fmt: skip
    from ..multi_lora import launch
    from ..multi_lora.tuning import tuning_of

    values_TW = values_TW if values_TW.stride(1) == 1 else values_TW.contiguous()
    num_rows, width = values_TW.shape
    adapters = launch.Adapters(slot_rows, (width,), 0, deterministic)
    layout = launch.layout_of(adapters, values_TW.device)
    bounds_S3 = rows.slot_bounds_S3
    if bounds_S3 is None:
        bounds_S3 = slot_bounds(rows.slot_of_row_T, len(slot_rows))
    scale_S = values_TW.new_ones(len(slot_rows), dtype=torch.float32)
    tensors = launch.RowTensors(rows.slot_of_row_T, bounds_S3, scale_S, None)
    tuning = tuning_of(
        num_rows, width, (width,), len(slot_rows), layout.rank_pad, values_TW.element_size(),
        deterministic,
    )  # fmt: skip
    ones_TJ = values_TW.new_ones((num_rows, layout.j_width))
    like_RW = values_TW.new_empty((layout.total_rank, width), dtype=torch.float32)
    targets = None
    if target_RW is not None:
        assert keep_S is not None
        targets = launch.GradTargets(target_RW, target_RW, keep_S)
    return launch.outer(ones_TJ, values_TW, like_RW, tensors, adapters, layout, tuning, targets)

"""The multi-task bottleneck in plain torch: what the fast form is compared with.

Shape suffixes: T rows, O features, R pool rank rows, U rows of the up biases (one a slot with a
rank), S slots, r rank of one slot.
"""

import torch
from torch import Tensor

from ..dropout import RowDropout, dropout_keep_mask
from ..rows import SlotRows, slot_offsets


def multi_task_bottleneck_reference(
    y_TO: Tensor,
    down_RO: Tensor,
    down_bias_R: Tensor,
    up_RO: Tensor,
    up_bias_UO: Tensor,
    owned_S: Tensor,
    slot_ranks: tuple[int, ...],
    rows: SlotRows,
    dropout: RowDropout | None = None,
    module_key: int = 0,
) -> Tensor:
    """z_TO by torch's own autograd, span by span from the span's own slot's parameters."""
    offsets = slot_offsets(slot_ranks)
    bias_row = slot_offsets(tuple(int(rank > 0) for rank in slot_ranks))
    parts, last_stop = [], 0
    for slot, start, stop in rows.spans:
        parts.append(y_TO[last_stop:start])
        last_stop, own_TO = stop, y_TO[start:stop]
        if slot_ranks[slot] and bool(owned_S[slot]):
            pool_rows = slice(offsets[slot], offsets[slot + 1])
            kept_TO = _kept(own_TO, dropout, module_key, slot, start, stop)
            down_rO, bias_r = (p[pool_rows].to(y_TO.dtype) for p in (down_RO, down_bias_R))
            inner_Tr = torch.relu(kept_TO @ down_rO.T + bias_r)
            change_TO = inner_Tr @ up_RO[pool_rows].to(y_TO.dtype)
            own_TO = own_TO + change_TO + up_bias_UO[bias_row[slot]].to(y_TO.dtype)
        parts.append(own_TO)
    return torch.cat([*parts, y_TO[last_stop:]])


def _kept(
    y_TO: Tensor, dropout: RowDropout | None, module_key: int, slot: int, start: int, stop: int
) -> Tensor:
    rate = 0.0 if dropout is None else float(dropout.rate_S[slot])
    if dropout is None or rate == 0.0:
        return y_TO
    keep_TO = dropout_keep_mask(dropout.row_key_T[start:stop], module_key, y_TO.shape[1], rate)
    return torch.where(keep_TO, y_TO / (1.0 - rate), 0.0)

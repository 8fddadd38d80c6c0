"""The multi-task low-rank linear in plain torch: what the fast forms are compared with.

Shape suffixes: T rows, D input features, O output features, R pool rank rows (the sum of the
slots' ranks), S slots, M member linears that share an input.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..dropout import RowDropout, dropout_keep_mask
from ..rows import SlotRows, Span, slot_offsets


def multi_lora_linear_reference(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    slot_ranks: tuple[int, ...],
    scale_S: Tensor,
    rows: SlotRows,
    dropout: RowDropout | None = None,
    module_key: int = 0,
    deterministic: bool = False,
    out_features: tuple[int, ...] | None = None,
) -> Tensor:
    """y_TO, differentiable with respect to x, A and B by torch's own autograd.

    Each span is computed from its own rows and its own slot's factors only: nothing of another
    slot enters, not even multiplied by zero. `deterministic` also computes the base product span
    by span, so that a BLAS that treats edge rows differently cannot tell where a span lies.
    """
    pieces = _pieces(rows.spans, x_TD.shape[0])
    sizes = [stop - start for _, start, stop in pieces]
    weight_OD, bias_O = weight_OD.detach(), None if bias_O is None else bias_O.detach()
    x_parts = x_TD.split(sizes)
    if deterministic:
        base_parts = [functional.linear(part, weight_OD, bias_O) for part in x_parts]
    else:
        base_parts = functional.linear(x_TD, weight_OD, bias_O).split(sizes)
    widths = out_features or (weight_OD.shape[0],)
    factors = _slot_factors(a_RD, b_OR, slot_ranks, widths, x_TD.dtype)
    out = []
    for (slot, start, stop), part_TD, base_TO in zip(pieces, x_parts, base_parts, strict=True):
        if slot < 0 or slot_ranks[slot] == 0 or start == stop:
            out.append(base_TO)
            continue
        kept_TD = _dropped(part_TD, dropout, module_key, slot, start, stop)
        delta_TO = torch.cat([(kept_TD @ a_rD.T) @ b_or.T for a_rD, b_or in factors[slot]], dim=1)
        out.append(base_TO + delta_TO * scale_S[slot].to(x_TD.dtype))
    return torch.cat(out)


def _pieces(spans: tuple[Span, ...], num_rows: int) -> list[Span]:
    """The spans with the filler between them as spans of slot -1."""
    pieces, last_stop = [], 0
    for slot, start, stop in spans:
        if start > last_stop:
            pieces.append((-1, last_stop, start))
        pieces.append((slot, start, stop))
        last_stop = stop
    if last_stop < num_rows or not pieces:
        pieces.append((-1, last_stop, num_rows))
    return pieces


def _slot_factors(
    a_RD: Tensor, b_OR: Tensor, slot_ranks: tuple[int, ...], widths: tuple[int, ...], dtype
) -> list[list[tuple[Tensor, Tensor]]]:
    """[slot][member] -> (A of that slot and member, B of that slot and member)."""
    slot_offsets(slot_ranks)
    members_a = [part.split(slot_ranks) for part in a_RD.to(dtype).chunk(len(widths))]
    members_b = [part.split(slot_ranks, dim=1) for part in b_OR.to(dtype).split(widths)]
    return [
        [(a[slot], b[slot]) for a, b in zip(members_a, members_b, strict=True)]
        for slot in range(len(slot_ranks))
    ]


def _dropped(
    x_TD: Tensor, dropout: RowDropout | None, module_key: int, slot: int, start: int, stop: int
) -> Tensor:
    rate = 0.0 if dropout is None else float(dropout.rate_S[slot])
    if dropout is None or rate == 0.0:
        return x_TD
    keep_TD = dropout_keep_mask(dropout.row_key_T[start:stop], module_key, x_TD.shape[1], rate)
    return torch.where(keep_TD, x_TD / (1.0 - rate), 0.0)

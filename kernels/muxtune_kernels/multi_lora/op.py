"""Dispatch of the multi-task low-rank linear by device.

Shape suffixes: T rows, D input features, O output features, R pool rank rows (the sum of the
slots' ranks), S slots, M member linears that share an input.
"""

from torch import Tensor
from torch.nn import functional

from ..dropout import RowDropout
from ..rows import SlotRows
from .reference import multi_lora_linear_reference


def multi_lora_linear(
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
) -> Tensor:
    """y = x W^T + bias + scale_s (dropout(x) A_s^T) B_s^T on the rows of slot s; [T, O].

    x_TD: [T, D], float32 or bfloat16. weight_OD, bias_O: frozen, dtype of x.
    a_RD, b_OR: slot s owns rows offset_s : offset_s + rank_s of A and the same columns of B,
        where offset_s is the sum of the ranks before it; a slot of rank 0 does not adapt this
        linear. They may be float32 beside a bfloat16 x: they are cast as they are read, and
        their gradients come back in float32, accumulated in float32. B is read fastest when it
        is the transpose of a contiguous [R, O] tensor.
    slot_ranks: static; a new tuple means a new CUDA graph. scale_S: float32 [S].
    rows, dropout: per micro-batch; filler rows (-1) get the base op only.
    module_key: names this linear among those that a row passes, for independent dropout masks.
    deterministic: bit-identical results for a slot wherever its rows lie in a micro-batch of the
        same shape, provided that they are one contiguous span. CUDA is free of atomics either way.

    Backward gives dx (base and adapter), dA, dB; never dW. Nothing crosses slots: a NaN in one
    slot's rows, A or B leaves the others bit-identical.
    Raises ValueError on shapes that do not fit.
    """
    return multi_lora_linear_group(
        x_TD, weight_OD, bias_O, a_RD, b_OR, (weight_OD.shape[0],), slot_ranks, scale_S, rows,
        dropout, module_key, deterministic,
    )  # fmt: skip


def multi_lora_linear_group(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    out_features: tuple[int, ...],
    slot_ranks: tuple[int, ...],
    scale_S: Tensor,
    rows: SlotRows,
    dropout: RowDropout | None = None,
    module_key: int = 0,
    deterministic: bool = False,
) -> Tensor:
    """M linears that read the same x (fused QKV, gate and up), as one; [T, sum of out_features].

    weight_OD, bias_O, b_OR: the members' own, concatenated along O. a_RD: [M * R, D], member m's
    A pool in rows m * R : (m + 1) * R. `slot_ranks` holds for every member: where a task adapts
    only some members or with smaller ranks, zero the others' rows of A and columns of B; zeros
    get zero gradients and stay zero. The members share one dropout mask (one module key).
    Everything else as in `multi_lora_linear`.
    """
    _check(x_TD, weight_OD, a_RD, b_OR, out_features, slot_ranks, scale_S, rows)
    if sum(slot_ranks) == 0:
        bias_O = None if bias_O is None else bias_O.detach()
        return functional.linear(x_TD, weight_OD.detach(), bias_O)
    if x_TD.is_cuda:
        from .autograd import multi_lora_linear_cuda  # triton is needed on CUDA only
        from .launch import Adapters

        adapters = Adapters(slot_ranks, out_features, module_key, deterministic)
        return multi_lora_linear_cuda(
            x_TD, weight_OD, bias_O, a_RD, b_OR, scale_S, rows, dropout, adapters
        )
    return multi_lora_linear_reference(
        x_TD, weight_OD, bias_O, a_RD, b_OR, slot_ranks, scale_S, rows, dropout, module_key,
        deterministic, out_features,
    )  # fmt: skip


def _check(
    x_TD: Tensor,
    weight_OD: Tensor,
    a_RD: Tensor,
    b_OR: Tensor,
    out_features: tuple[int, ...],
    slot_ranks: tuple[int, ...],
    scale_S: Tensor,
    rows: SlotRows,
) -> None:
    num_rows, width = x_TD.shape
    rank, out = sum(slot_ranks), sum(out_features)
    for name, tensor, want in (
        ("weight_OD", weight_OD, (out, width)),
        ("a_RD", a_RD, (len(out_features) * rank, width)),
        ("b_OR", b_OR, (out, rank)),
        ("scale_S", scale_S, (len(slot_ranks),)),
        ("slot_of_row_T", rows.slot_of_row_T, (num_rows,)),
    ):
        if tensor.shape != want:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {want}")

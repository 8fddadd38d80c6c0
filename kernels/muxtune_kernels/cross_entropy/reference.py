"""Cross-entropy per task: the naive form, and the chunked form that the CPU uses.

Shape suffixes: T rows, C rows of one chunk, D model features, V vocabulary, S slots.
"""

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100
MAX_CHUNK_ROWS = 256  # of 49,152 words that is 96 MiB of logits; more rows are no faster on a CPU


def multi_task_cross_entropy_reference(
    hidden_TD: Tensor,
    lm_head_VD: Tensor,
    labels_T: Tensor,
    slot_of_row_T: Tensor,
    loss_scale_S: Tensor,
    num_slots: int,
) -> Tensor:
    """loss_S by the full logits and torch's autograd; for tests."""
    logits_TV = (hidden_TD @ lm_head_VD.detach().T).float()
    nll_T = functional.cross_entropy(
        logits_TV, labels_T, ignore_index=IGNORED_LABEL, reduction="none"
    )
    losses = []
    for slot in range(num_slots):
        owned_T = (slot_of_row_T == slot) & (labels_T != IGNORED_LABEL)
        losses.append(nll_T[owned_T].sum() * loss_scale_S[slot])
    return torch.stack(losses)


def slot_losses(
    hidden_TD: Tensor,
    lm_head_VD: Tensor,
    labels_T: Tensor,
    slot_of_row_T: Tensor,
    scale_S: Tensor,
    num_slots: int,
    chunk_rows: int,
    grad_TD: Tensor | None,
) -> Tensor:
    """float32 [S], and the gradient of its sum into grad_TD where one is given.

    Gathers a slot's target rows, then cuts them into chunks: rows without a target cost nothing,
    and a chunk's shape depends on its own task alone. Two numbers a logit exist at once.
    """
    chunk_rows = min(chunk_rows, MAX_CHUNK_ROWS)
    loss_S = torch.zeros(num_slots, dtype=torch.float32)
    for slot in range(num_slots):
        owned_T = (slot_of_row_T == slot) & (labels_T != IGNORED_LABEL)
        for index_C in owned_T.nonzero().flatten().split(chunk_rows):
            if index_C.numel() == 0:
                continue
            logits_CV = (hidden_TD[index_C] @ lm_head_VD.T).float()
            log_prob_CV = torch.log_softmax(logits_CV, dim=1)
            del logits_CV
            label_C1 = labels_T[index_C, None]
            loss_S[slot] -= log_prob_CV.gather(1, label_C1).sum() * scale_S[slot]
            if grad_TD is not None:
                grad_CV = log_prob_CV.exp_()
                grad_CV.scatter_add_(1, label_C1, torch.full_like(grad_CV[:, :1], -1.0))
                grad_CV *= scale_S[slot]
                grad_TD[index_C] = grad_CV.to(lm_head_VD.dtype) @ lm_head_VD
                del grad_CV
            del log_prob_CV  # before the next chunk asks for as much
    return loss_S

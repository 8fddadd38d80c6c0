"""The multi-task cross-entropy on the CPU."""

import pytest
import torch
from torch.nn import functional

from muxtune_kernels import multi_task_cross_entropy, multi_task_nll, slot_rows
from muxtune_kernels.cross_entropy import multi_task_cross_entropy_reference, reference

T, D, V, S = 23, 8, 31, 4


def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(T, D, requires_grad=True)
    labels = torch.randint(0, V, (T,))
    labels[3:6] = -100
    slot_of_row = slot_rows([(2, 0, 9), (0, 10, 20)], T, S).slot_of_row_T
    return hidden, torch.randn(V, D), labels, slot_of_row, torch.rand(S) + 0.1


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_equals_the_naive_form(chunk_rows: int) -> None:
    hidden, head, labels, slots, scale = inputs()
    weight_S = torch.tensor([1.0, 3.0, -2.0, 5.0])
    loss = multi_task_cross_entropy(hidden, head, labels, slots, scale, S, chunk_rows)
    expected = multi_task_cross_entropy_reference(hidden, head, labels, slots, scale, S)
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss @ weight_S, hidden)
    (grad_expected,) = torch.autograd.grad(expected @ weight_S, hidden)
    torch.testing.assert_close(grad, grad_expected)
    assert (grad[3:6] == 0).all()


def test_few_rows_of_logits_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels, slots, scale = inputs()
    expected = multi_task_cross_entropy(hidden, head, labels, slots, scale, S)
    monkeypatch.setattr(reference, "MAX_CHUNK_ROWS", 3)
    rows: list[int] = []
    log_softmax = torch.log_softmax

    def counted(logits_CV: torch.Tensor, dim: int) -> torch.Tensor:
        rows.append(len(logits_CV))
        return log_softmax(logits_CV, dim)

    monkeypatch.setattr(torch, "log_softmax", counted)
    loss = multi_task_cross_entropy(hidden, head, labels, slots, scale, S)
    assert max(rows) == 3 and sum(rows) == 16
    torch.testing.assert_close(loss, expected)


def test_scaled_by_the_target_count_it_is_the_mean_loss() -> None:
    hidden, head, labels, slots, _ = inputs()
    scale = torch.tensor([1 / 10, 0.0, 1 / 6, 0.0])
    loss = multi_task_cross_entropy(hidden, head, labels, slots, scale, S)
    mean = functional.cross_entropy(hidden[10:20] @ head.T, labels[10:20])
    torch.testing.assert_close(loss[0], mean)


def test_nll_and_counts() -> None:
    hidden, head, labels, slots, _ = inputs()
    nll, count = multi_task_nll(hidden, head, labels, slots, S)
    expected = functional.cross_entropy(hidden[:9] @ head.T, labels[:9], reduction="sum")
    torch.testing.assert_close(nll[2], expected.detach())
    assert count.tolist() == [10, 0, 6, 0]
    assert not nll.requires_grad


def test_nan_stays_in_its_slot() -> None:
    hidden, head, labels, slots, scale = inputs()
    clean = multi_task_cross_entropy(hidden, head, labels, slots, scale, S)
    (clean_grad,) = torch.autograd.grad(clean.sum(), hidden)
    poisoned = hidden.detach().clone()
    poisoned[12] = float("nan")
    poisoned.requires_grad_()
    loss = multi_task_cross_entropy(poisoned, head, labels, slots, scale, S)
    (grad,) = torch.autograd.grad(loss.sum(), poisoned)
    assert loss[0].isnan()
    assert torch.equal(loss[1:], clean[1:])
    assert torch.equal(grad[:10], clean_grad[:10])


def test_without_grad() -> None:
    hidden, head, labels, slots, scale = inputs()
    loss = multi_task_cross_entropy(hidden.detach(), head, labels, slots, scale, S)
    assert not loss.requires_grad

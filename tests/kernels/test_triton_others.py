"""The Triton forms of dropout bits, cross-entropy and AdamW against their references."""

# Triton's jit hides launch options and constexpr parameters from the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    pytest.skip("triton is not installed", allow_module_level=True)


from muxtune_kernels import dropout_keep_mask, row_keys, slot_rows
from muxtune_kernels.adamw.reference import multi_task_adamw_reference_
from muxtune_kernels.cross_entropy import multi_task_cross_entropy_reference

spec = importlib.util.spec_from_file_location(
    "adamw_cases", Path(__file__).with_name("adamw_cases.py")
)
assert spec is not None
assert spec.loader is not None
cases = sys.modules.setdefault("adamw_cases", importlib.util.module_from_spec(spec))
spec.loader.exec_module(cases)


def test_dropout_bits_are_those_of_torch(device: torch.device) -> None:
    from muxtune_kernels.dropout.bits import keep_bits, row_words
    from muxtune_kernels.dropout.reference import mix_word

    @triton.jit
    def kernel(key_ptr, out_ptr, word, threshold, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        row_T = tl.arange(0, ROWS)
        column_D = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        word_T = row_words(tl.load(key_ptr + row_T), word)
        bits = keep_bits(word_T, tl.program_id(0) * WIDTH, row_T * 0 + threshold, WIDTH)
        tl.store(out_ptr + row_T[:, None] * 256 + column_D[None, :], bits.to(tl.int8))

    kernel.fn.__globals__.update(row_words=row_words, keep_bits=keep_bits, tl=tl)
    keys = row_keys(1 << 40, 17, 3, torch.arange(32)).to(device)
    for module_key in (0, 12345, (1 << 32) - 1):
        out = torch.full((32, 256), -1, dtype=torch.int8, device=device)
        word = mix_word(module_key)
        word -= (1 << 32) * (word >= 1 << 31)
        kernel[(4,)](keys, out, word, int(0.3 * 65536 + 0.5), 32, 64)
        assert torch.equal(out.bool(), dropout_keep_mask(keys, module_key, 256, 0.3))


def cross_entropy_inputs(device: torch.device, dtype: torch.dtype, vocabulary: int):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator).to(device, dtype)
    head = torch.randn(vocabulary, 24, generator=generator).to(device, dtype)
    labels = torch.randint(0, vocabulary, (37,), generator=generator).to(device)
    labels[3:6] = -100
    rows = slot_rows([(2, 0, 10), (0, 12, 30), (3, 30, 36)], 37, 4, device)
    scale = (torch.rand(4, generator=generator) + 0.1).to(device)
    return hidden, head, labels, rows.slot_of_row_T, scale


@pytest.mark.parametrize("vocabulary", [31, 4097])
@pytest.mark.parametrize(("chunk_rows", "whole"), [(16, False), (1024, False), (64, True)])
def test_cross_entropy(vocabulary: int, chunk_rows: int, whole: bool, device: torch.device) -> None:
    from muxtune_kernels.cross_entropy.kernels import slot_losses_cuda

    inputs = cross_entropy_inputs(device, torch.float32, vocabulary)
    leaf = inputs[0].clone().requires_grad_()
    expected = multi_task_cross_entropy_reference(leaf, *inputs[1:], 4)
    (grad_expected,) = torch.autograd.grad(expected.sum(), leaf)
    grad = torch.full_like(inputs[0], float("nan"))
    loss = slot_losses_cuda(*inputs, 4, chunk_rows, grad, whole)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, grad_expected, atol=2e-5, rtol=2e-4)
    assert torch.equal(slot_losses_cuda(*inputs, 4, chunk_rows, None, whole), loss)


def test_whole_chunks_of_the_cross_entropy_do_not_depend_on_the_rows_behind(
    device: torch.device,
) -> None:
    """What a library computes for a row may depend on how many rows a product has."""
    from muxtune_kernels.cross_entropy.kernels import slot_losses_cuda

    hidden, head, labels, slots, scale = cross_entropy_inputs(device, torch.float32, 4097)
    grads = []
    for count in (len(hidden), len(hidden) - 5):
        grad = torch.full_like(hidden[:count], float("nan"))
        slot_losses_cuda(
            hidden[:count], head, labels[:count], slots[:count], scale, 4, 16, grad, True
        )
        grads.append(grad)
    assert torch.equal(grads[0][: len(grads[1])], grads[1])


def test_cross_entropy_keeps_nan_in_its_slot(device: torch.device) -> None:
    from muxtune_kernels.cross_entropy.kernels import slot_losses_cuda

    hidden, *rest = cross_entropy_inputs(device, torch.float32, 101)
    clean_grad, grad = torch.empty_like(hidden), torch.empty_like(hidden)
    clean = slot_losses_cuda(hidden, *rest, 4, 16, clean_grad)
    hidden[[4, 20]] = float("nan")  # one of them has no target
    loss = slot_losses_cuda(hidden, *rest, 4, 16, grad)
    assert loss[0].isnan()
    assert torch.equal(loss[1:], clean[1:])
    assert grad[20].isnan().all()
    others = [i for i in range(37) if i != 20]
    assert torch.equal(grad[others], clean_grad[others])


def test_public_cross_entropy_in_bfloat16(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    from muxtune_kernels import multi_task_cross_entropy, multi_task_nll

    inputs = cross_entropy_inputs(device, torch.bfloat16, 32000)
    leaf = inputs[0].clone().requires_grad_()
    exact = inputs[0].double().cpu().requires_grad_()
    host = [tensor.cpu() for tensor in inputs[1:]]
    expected = multi_task_cross_entropy_reference(exact, host[0].double(), *host[1:], 4)
    (grad_expected,) = torch.autograd.grad(expected.sum(), exact)
    loss = multi_task_cross_entropy(leaf, *inputs[1:], 4, 16)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert (loss.cpu() - expected).norm() / expected.norm() < 1e-3
    assert (grad.cpu().double() - grad_expected).norm() / grad_expected.norm() < 8e-3
    _, counts = multi_task_nll(*inputs[:4], 4)
    assert counts.tolist() == [18, 0, 7, 6]


@pytest.mark.parametrize("with_copy", [False, True])
def test_adamw(with_copy: bool, device: torch.device) -> None:
    from muxtune_kernels.adamw.kernels import multi_task_adamw_cuda_

    # The interpreter truncates to bfloat16 where hardware rounds.
    half = torch.float16 if device.type == "cpu" else torch.bfloat16
    copy = half if with_copy else None
    pools, slots = cases.pools_of(device, copy), cases.slots_of(device)
    twins, twin_slots = cases.pools_of("cpu", copy), cases.slots_of("cpu")
    for step in range(3):
        for group in (pools, twins):
            cases.fresh_grads(group, step)
            if step == 1:
                group[1].grad_RD[-1, 2099] = float("nan")
        for settings in (slots, twin_slots):
            settings.active_S[2] = step != 2
        result = multi_task_adamw_cuda_(pools, slots, zero_grads=step != 0)
        expected = multi_task_adamw_reference_(twins, twin_slots, zero_grads=step != 0)
        torch.testing.assert_close(result.grad_norm_S.cpu(), expected.grad_norm_S, equal_nan=True)
        assert torch.equal(result.skipped_S.cpu(), expected.skipped_S)
        assert torch.equal(slots.step_S.cpu(), twin_slots.step_S)
    for pool, twin in zip(pools, twins, strict=True):
        for i in range(4):
            torch.testing.assert_close(pool[i].cpu(), twin[i], rtol=1e-5, atol=2e-6, equal_nan=True)
        if copy is not None:
            assert pool.compute_copy_RD is not None
            last_step = [slot for slot in range(cases.S) if slot != 2]
            for slot in last_step:
                rows = slice(sum(pool.slot_rows[:slot]), sum(pool.slot_rows[: slot + 1]))
                assert torch.equal(pool.compute_copy_RD[rows], pool.param_RD[rows].to(copy))


def test_adamw_does_not_notice_the_slot_it_sits_in(device: torch.device) -> None:
    from muxtune_kernels import AdamWPool
    from muxtune_kernels.adamw.kernels import multi_task_adamw_cuda_

    torch.manual_seed(0)
    own = [torch.randn(3, 2500) for _ in range(2)]

    def run(slot: int, rows: tuple[int, ...]) -> torch.Tensor:
        start, total = sum(rows[:slot]), sum(rows)
        tensors = [torch.randn(total, 2500) for _ in range(2)] + [torch.zeros(total, 2500)] * 2
        for tensor, mine in zip(tensors, own, strict=False):
            tensor[start : start + 3] = mine
        pool = AdamWPool(*(tensor.clone().to(device) for tensor in tensors), rows)
        slots = cases.slots_of(device)
        slots.max_grad_norm_S.fill_(0.5)
        for setting in slots[:6]:
            setting[slot] = setting[0]
        multi_task_adamw_cuda_([pool], slots, True)
        return pool.param_RD[start : start + 3]

    assert torch.equal(run(0, (3, 0, 0, 0)), run(2, (5, 1, 3, 2)))

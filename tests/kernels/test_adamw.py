"""The multi-task AdamW on the CPU against torch's own, one optimizer a task."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from muxtune_kernels import multi_task_adamw_

spec = importlib.util.spec_from_file_location(
    "adamw_cases", Path(__file__).with_name("adamw_cases.py")
)
assert spec is not None
assert spec.loader is not None
cases = sys.modules.setdefault("adamw_cases", importlib.util.module_from_spec(spec))
spec.loader.exec_module(cases)


def parts(tensors: list[torch.Tensor], slot: int) -> list[torch.Tensor]:
    return [
        tensor[sum(rows[:slot]) : sum(rows[: slot + 1])]
        for tensor, rows in zip(tensors, cases.SLOT_ROWS, strict=True)
    ]


def test_equals_torch_for_every_slot() -> None:
    pools, slots = cases.pools_of(), cases.slots_of()
    own = [
        [part.clone().requires_grad_() for part in parts([p.param_RD for p in pools], slot)]
        for slot in range(cases.S)
    ]
    optimizers = [
        torch.optim.AdamW(
            own[slot], lr=float(slots.lr_S[slot]), eps=float(slots.eps_S[slot]),
            betas=(float(slots.beta1_S[slot]), float(slots.beta2_S[slot])),
            weight_decay=float(slots.weight_decay_S[slot]),
        )
        for slot in range(cases.S)
    ]  # fmt: skip
    for step in range(4):
        cases.fresh_grads(pools, step)
        grads = [pool.grad_RD.clone() for pool in pools]
        norm_S, skipped_S = multi_task_adamw_(pools, slots)
        assert not skipped_S.any()
        for slot, optimizer in enumerate(optimizers):
            for param, grad in zip(own[slot], parts(grads, slot), strict=True):
                param.grad = grad.clone()
            limit = float(slots.max_grad_norm_S[slot]) or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(own[slot], limit)
            optimizer.step()
            torch.testing.assert_close(norm_S[slot], norm)
            mine = parts([pool.param_RD for pool in pools], slot)
            torch.testing.assert_close(mine, [param.detach() for param in own[slot]])
    assert slots.step_S.tolist() == [4] * cases.S


def test_inactive_slots_are_untouched_and_keep_their_gradients() -> None:
    pools, slots = cases.pools_of(copy=torch.bfloat16), cases.slots_of()
    slots.active_S[2] = False
    before = [[t.clone() for t in parts([p[i] for p in pools], 2)] for i in (0, 1, 2, 3, 5)]
    result = multi_task_adamw_(pools, slots)
    after = [parts([p[i] for p in pools], 2) for i in (0, 1, 2, 3, 5)]
    assert all(torch.equal(b, a) for bs, as_ in zip(before, after, strict=True)
               for b, a in zip(bs, as_, strict=True))  # fmt: skip
    assert slots.step_S.tolist() == [1, 1, 0, 1]
    assert result.grad_norm_S[2] == 0
    assert all((part == 0).all() for part in parts([p.grad_RD for p in pools], 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_skips_its_slot_alone(value: float) -> None:
    pools, slots = cases.pools_of(), cases.slots_of()
    twins, twin_slots = cases.pools_of(), cases.slots_of()
    pools[1].grad_RD[1, 7] = value
    before = [part.clone() for part in parts([p.param_RD for p in pools], 1)]
    result = multi_task_adamw_(pools, slots)
    multi_task_adamw_(twins, twin_slots)
    assert result.skipped_S.tolist() == [False, True, False, False]
    assert slots.step_S.tolist() == [1, 0, 1, 1]
    after = parts([p.param_RD for p in pools], 1)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))
    for slot in (0, 2, 3):
        mine = parts([p.param_RD for p in pools], slot)
        clean = parts([p.param_RD for p in twins], slot)
        assert all(torch.equal(b, a) for b, a in zip(mine, clean, strict=True))
    assert all((part == 0).all() for part in parts([p.grad_RD for p in pools], 1))


def test_gradients_are_kept_on_request_and_copies_follow() -> None:
    pools, slots = cases.pools_of(copy=torch.bfloat16), cases.slots_of()
    grads = [pool.grad_RD.clone() for pool in pools]
    multi_task_adamw_(pools, slots, zero_grads=False)
    for pool, grad in zip(pools, grads, strict=True):
        assert torch.equal(pool.grad_RD, grad)
        assert torch.equal(pool.compute_copy_RD, pool.param_RD.bfloat16())


def test_misfits_are_refused() -> None:
    pools, slots = cases.pools_of(), cases.slots_of()
    with pytest.raises(ValueError, match="slot_rows"):
        multi_task_adamw_([pools[0]._replace(slot_rows=(1, 1, 1, 1))], slots)

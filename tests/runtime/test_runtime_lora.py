"""The deterministic CPU form of multi-task LoRA against plain autograd and the kernels' form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from muxtune.errors import ConfigError
from muxtune.runtime.adapters import adapter_method
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.bank import AdapterBank, SlotPool
from muxtune.runtime.linear import BaseLinear, LinearSite, module_key
from muxtune.runtime.passes import AdapterPass
from muxtune.types import AdapterSpec
from muxtune_kernels import RowDropout, dropout_keep_mask, row_keys, slot_rows
from tests.runtime.runtime_helpers import make_htask, make_task

ROWS = 64
SPANS = [(0, 3, 20), (1, 20, 33), (2, 40, 60)]
SITE = "model.layers.1.self_attn.q_proj"


def make_pool(store: BackboneStore, grad_dtype: torch.dtype = torch.float64) -> SlotPool:
    """Three slots of other ranks, of which the second does not adapt the site."""
    tasks = [
        make_task("x", rank=4, dropout=0.25),
        make_task("y", rank=2, targets=("k_proj",)),
        make_task("z", rank=3, alpha=5.0, dropout=0.1),
    ]
    bank = AdapterBank(store.get("tiny"), grad_dtype)
    states = {task.task_id: bank.create(task, 4) for task in tasks}
    (pool,) = bank.arrange([make_htask(tasks)], states)
    assert isinstance(pool, SlotPool)
    generator = torch.Generator().manual_seed(0)
    for parameters in pool.sites[SITE].parameters.values():
        parameters.param_RW.copy_(torch.randn(parameters.param_RW.shape, generator=generator))
    return pool


def make_pass(pool: SlotPool, deterministic: bool, with_dropout: bool) -> AdapterPass:
    keys = row_keys(7, 3, torch.arange(ROWS) // 9, torch.arange(ROWS) % 9)
    dropout = RowDropout(keys, pool.rate_S) if with_dropout else None
    rows = slot_rows(SPANS, ROWS, len(pool.slots))
    anchor = torch.zeros((), requires_grad=True)
    return AdapterPass(pool, rows, dropout, deterministic, anchor)


def expected_output(
    x: torch.Tensor, base: BaseLinear, pool: SlotPool, a: Any, b: Any, current: AdapterPass
) -> torch.Tensor:
    """By the definition, row by row of slots, in float64."""
    y = x @ base.weight_OD.double().T
    for slot, start, stop in SPANS:
        rows = pool.sites[SITE].parameters["lora_A"].rows_of(slot)
        kept = x[start:stop]
        if current.dropout is not None and pool.rates[slot]:
            keys = current.dropout.row_key_T[start:stop]
            keep = dropout_keep_mask(keys, base.site.key, x.shape[1], pool.rates[slot])
            kept = kept * keep / (1 - pool.rates[slot])
        delta = kept @ a[rows].T @ b[rows] * pool.scales[slot]
        y = torch.cat([y[:start], y[start:stop] + delta, y[stop:]])
    return y


@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_output_and_gradients(
    store: BackboneStore, deterministic: bool, with_dropout: bool
) -> None:
    pool = make_pool(store, torch.float64 if deterministic else torch.float32)
    current = make_pass(pool, deterministic, with_dropout)
    base = store.get("tiny").model.get_submodule(SITE).base
    x = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    upstream = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(3))
    site = pool.sites[SITE]
    y = site.method.linear(x, base, site, current)
    y.backward(upstream)
    current.commit()

    exact_x = x.detach().double().requires_grad_()
    a, b = (
        site.parameters[name].param_RW.double().requires_grad_() for name in ("lora_A", "lora_B")
    )
    exact_y = expected_output(exact_x, base, pool, a, b, current)
    exact_y.backward(upstream.double())
    assert exact_x.grad is not None and x.grad is not None
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-4)
    for name, exact in (("lora_A", a), ("lora_B", b)):
        assert exact.grad is not None
        got = site.parameters[name].grad_RW.double()
        torch.testing.assert_close(got, exact.grad, rtol=1e-4, atol=1e-4)


def test_a_base_model_in_bfloat16_computes_in_it(store: BackboneStore) -> None:
    """Factors and their gradients stay in float32."""
    pool = make_pool(store)
    current, site = make_pass(pool, True, True), pool.sites[SITE]
    base = store.get("tiny").model.get_submodule(SITE).base
    half = base._replace(weight_OD=base.weight_OD.bfloat16())
    x = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    x.requires_grad_()
    y = site.method.linear(x, half, site, current)
    y.sum().backward()
    current.commit()
    exact_x = x.detach().double().requires_grad_()
    a, b = (
        site.parameters[name].param_RW.double().requires_grad_() for name in ("lora_A", "lora_B")
    )
    exact_y = expected_output(exact_x, half, pool, a, b, current)
    exact_y.sum().backward()
    pairs = [(y, exact_y), (x.grad, exact_x.grad)]
    pairs += [(site.parameters[n].grad_RW, e.grad) for n, e in (("lora_A", a), ("lora_B", b))]
    for found, exact in pairs:
        assert found is not None and exact is not None
        assert (found.double() - exact).norm() <= 0.01 * exact.norm()


def test_nothing_reaches_the_pool_before_commit(store: BackboneStore) -> None:
    pool = make_pool(store)
    current = make_pass(pool, True, False)
    site = pool.sites[SITE]
    base = store.get("tiny").model.get_submodule(SITE).base
    site.method.linear(torch.ones(ROWS, 64), base, site, current).sum().backward()
    assert all(not parameters.grad_RW.any() for parameters in site.parameters.values())
    current.commit()
    assert all(parameters.grad_RW.any() for parameters in site.parameters.values())


def test_a_slot_of_many_spans_adds_up(store: BackboneStore) -> None:
    whole, apart = make_pool(store), make_pool(store)
    base = store.get("tiny").model.get_submodule(SITE).base
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    for pool, spans in ((whole, [(0, 0, 32)]), (apart, [(0, 0, 9), (0, 9, 20), (0, 20, 32)])):
        rows = slot_rows(spans, 32, 3)
        current = AdapterPass(pool, rows, None, True, torch.zeros((), requires_grad=True))
        site = pool.sites[SITE]
        site.method.linear(x, base, site, current).square().sum().backward()
        current.commit()
    for name in ("lora_A", "lora_B"):
        left, right = (pool.sites[SITE].parameters[name].grad_RW for pool in (whole, apart))
        assert left.any()
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-4)


def test_start_values_are_those_of_peft_and_depend_on_seed_and_module_only() -> None:
    lora = adapter_method("lora")
    site, other = (LinearSite(name, 64, 32, module_key(name)) for name in ("a.q_proj", "b.q_proj"))
    spec = AdapterSpec(rank=8)

    def draw(where: LinearSite, seed: int) -> torch.Tensor:
        return lora.initialise(spec, where, torch.Generator().manual_seed(seed))["lora_A"]

    assert torch.equal(draw(site, 1), draw(site, 1))
    assert not torch.equal(draw(site, 1), draw(site, 2))
    assert not lora.initialise(spec, other, torch.Generator())["lora_B"].any()
    bound = 1 / 64**0.5  # kaiming_uniform_ with a = sqrt(5)
    assert 0.95 * bound < draw(site, 1).abs().max() <= bound


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec(rank=0), "adapter.rank"),
        (AdapterSpec(dropout=1.0), "adapter.dropout"),
        (AdapterSpec(options={"colour": 3}), "colour"),
    ],
)
def test_refuses_settings(spec: AdapterSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_method("lora").check(spec)


def test_an_unknown_method_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'lorra' does not exist.*did you mean 'lora'.*lora"):
        adapter_method("lorra")

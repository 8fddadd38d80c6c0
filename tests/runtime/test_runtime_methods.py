"""Adapter methods beside each other in one pass, each against plain HF PEFT training alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from muxtune.errors import ConfigError
from muxtune.runtime.adapters import METHODS, adapter_method
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.bank import AdapterBank, SlotPool, adapter_slot
from muxtune.runtime.evaluate import pack_for_slot
from muxtune.runtime.passes import AdapterPass
from muxtune.runtime.peft_io import read_adapter
from muxtune.types import AdapterSlot, AdapterSpec, EventKind, PackRule, ResultData, TaskSpec
from muxtune.workload import methods as task_file
from muxtune.workload.encoding import EncodedSequence
from muxtune.workload.methods import WITHOUT_TARGETS
from tests.runtime.peft_reference import Batch, SeededDropout, plain_copy
from tests.runtime.runtime_helpers import TINY, Bench, make_htask, make_plan, make_task, worst_gap

STEPS = 20
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Weights = dict[tuple[str, str], torch.Tensor]


def mixed_tasks() -> list[TaskSpec]:
    """Methods, ranks, targets, batch sizes and accumulation differ; sites hold several methods."""
    common = {"num_steps": STEPS, "lr": 3e-3}
    return [
        make_task("lora", **common, targets=ALL),
        make_task("rslora", **common, rank=9, targets=ALL, options={"use_rslora": True}),
        make_task(
            "ia3",
            **{**common, "lr": 3e-2},
            method="ia3",
            targets=("k_proj", "v_proj", "down_proj"),
            batch_size=2,
            accumulation=2,
            weight_decay=0.1,
        ),
        make_task("dora", **common, method="dora", rank=6, targets=ALL, batch_size=5),
        make_task(
            "dora rs",
            **common,
            method="dora",
            rank=2,
            targets=("q_proj", "down_proj"),
            options={"use_rslora": True},
            max_length_tokens=12,
        ),
        make_task(
            "ia3 out",
            **{**common, "lr": 3e-2},
            method="ia3",
            targets=("down_proj", "up_proj"),
            options={"feedforward_modules": ["up_proj"]},
        ),
        make_task(
            "dora dropped", **common, method="dora", rank=3, targets=ALL, dropout=0.3, batch_size=2
        ),
        make_task("prefix", **{**common, "lr": 3e-2}, method="prefix", rank=5, targets=()),
        make_task(
            "prefix 2",
            **common,
            method="prefix",
            rank=2,
            targets=(),
            batch_size=2,
            accumulation=2,
            max_length_tokens=9,
        ),
        make_task("prompt", **{**common, "lr": 0.5}, method="prompt", rank=6, targets=()),
        make_task("prompt 1", **common, method="prompt", rank=1, targets=(), batch_size=4),
    ]


PEFT_TASKS = [task.task_id for task in mixed_tasks()]


def peft_config(spec: AdapterSpec) -> Any:
    """Written against PEFT's documentation, not against what the runtime saves."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    if spec.method in WITHOUT_TARGETS:
        kind = PrefixTuningConfig if spec.method == "prefix" else PromptTuningConfig
        return kind(num_virtual_tokens=spec.rank, task_type="CAUSAL_LM")
    targets = list(spec.targets)
    if spec.method == "ia3":
        feedforward: Any = spec.options.get("feedforward_modules", ["down_proj"])
        return IA3Config(
            target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM"
        )
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        use_dora=spec.method == "dora",
        use_rslora=bool(spec.options.get("use_rslora")),
        task_type="CAUSAL_LM",
    )


class PeftTraining:
    """PEFT's own modules, autograd and torch's AdamW; only what starts random (LoRA's A, prefixes,
    prompts) is taken from us."""

    def __init__(self, store: BackboneStore, task: TaskSpec) -> None:
        from peft import get_peft_model

        backbone, settings = store.get("tiny"), task.optimizer
        self.task = task
        self.model = get_peft_model(plain_copy(backbone.model), peft_config(task.adapter)).train()
        start = AdapterBank(backbone, torch.float32).create(task, STEPS).parameters()
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                site = name.removeprefix("base_model.model.")
                module.lora_A["default"].weight.data.copy_(start[site]["lora_A"])
        self.now = SimpleNamespace(task=task, step=0, batch=None)
        if task.adapter.dropout:
            for name, module in self.model.named_modules():
                if hasattr(module, "lora_dropout") and len(module.lora_dropout):
                    key = backbone.sites[name.removeprefix("base_model.model.")].key
                    dropout = SeededDropout(key, task.adapter.dropout, self.now)
                    module.lora_dropout["default"] = dropout
        if task.adapter.method in WITHOUT_TARGETS:
            whole = adapter_method(task.adapter.method).save(start)["prompt_embeddings"]
            self.model.prompt_encoder["default"].embedding.weight.data.copy_(whole)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=settings.lr, weight_decay=settings.weight_decay
        )

    def backward(self, sequences: Sequence[EncodedSequence]) -> float:
        batch = self.now.batch = Batch(sequences, range(len(sequences)))
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits = logits[:, -batch.input_ids.shape[1] :]  # the virtual tokens carry no loss
        total = sum(item.target_tokens for item in sequences)
        nll = functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="sum"
        )
        (nll / total).backward()
        return nll.item() / total

    def step(self, sequences: Sequence[EncodedSequence]) -> tuple[float, float]:
        loss = self.backward(sequences)
        limit = self.task.optimizer.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.now.step += 1
        return loss, float(norm)


@pytest.fixture(scope="module")
def together(store: BackboneStore, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """All of them in one hTask, trained to the end."""
    tasks = mixed_tasks()
    bench = Bench(tmp_path_factory.mktemp("together"), store)
    bench.run(make_plan([make_htask(tasks, chunk_tokens=24)]), *tasks)
    assert bench.done() == set(PEFT_TASKS), bench.events
    return bench


@pytest.mark.parametrize("task_id", PEFT_TASKS)
def test_twenty_steps_in_company_equal_peft_alone(
    store: BackboneStore, together: Bench, task_id: str
) -> None:
    task = together.library.specs[task_id]
    run = PeftTraining(store, task)
    records = [item for item in together.recorder.steps if item.task_id == task_id]
    assert len(records) == STEPS
    for step, record in enumerate(records):
        loss, norm = run.step(together.library.step_sequences(task_id, step))
        assert record.loss == pytest.approx(loss, abs=1e-4), step
        assert record.grad_norm == pytest.approx(norm, rel=1e-3), step
    theirs = our_names(run.trained)
    assert worst_gap(as_saved(together.weights(task), task), theirs) < 1e-3
    assert abs(records[-1].loss - records[0].loss) > 1e-2


def as_saved(weights: Weights, task: TaskSpec) -> Weights:
    """PEFT keeps virtual tokens of all layers in one matrix; other weights stay as they are."""
    if task.adapter.method not in WITHOUT_TARGETS:
        return weights
    sites: dict[str, dict[str, torch.Tensor]] = {}
    for (site, name), value in weights.items():
        sites.setdefault(site, {})[name] = value
    whole = adapter_method(task.adapter.method).save(sites)["prompt_embeddings"]
    return {("all", "virtual"): whole}


def our_names(trained: dict[str, torch.Tensor]) -> Weights:
    """PEFT's parameters as the bank keys and shapes them."""
    out: Weights = {}
    for name, value in trained.items():
        if name.startswith("prompt_encoder"):
            out["all", "virtual"] = value.detach()
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".weight")
        path = path.replace(".default", "")
        site, _, kind = path.rpartition(".")
        value = value.detach()
        if kind == "ia3_l":
            is_input = value.shape[0] == 1
            out[site, "ia3_in" if is_input else "ia3_out"] = value if is_input else value.T
        else:
            flat = value[None] if value.dim() == 1 else value
            out[site, kind] = flat.T if kind == "lora_B" else flat
    return out


@pytest.mark.parametrize("task_id", PEFT_TASKS)
def test_peft_loads_the_folder_with_the_same_logits(
    store: BackboneStore, together: Bench, task_id: str
) -> None:
    from peft import PeftModel

    task, folder = together.library.specs[task_id], folder_of(together, task_id)
    backbone = store.get("tiny")
    base = plain_copy(backbone.model).eval()
    loaded = PeftModel.from_pretrained(plain_copy(backbone.model), folder).eval()
    for tokens, _ in together.library.validation(task_id):
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            theirs, plain = loaded(input_ids=ids[None]).logits[0], base(ids[None]).logits[0]
        theirs = theirs[-len(ids) :]
        torch.testing.assert_close(logits_of(together, task, ids), theirs, rtol=1e-4, atol=1e-4)
        assert float((theirs - plain).abs().max()) > 1e-2
    read = read_adapter(Path(folder), task, backbone)
    for (site, name), values in together.state(task).tensors.items():
        assert torch.equal(read[site][name], values.param)


def targets_of(method: str) -> tuple[str, ...]:
    return () if method in WITHOUT_TARGETS else ("v_proj", "down_proj")


def folder_of(bench: Bench, task_id: str) -> str:
    (result,) = [e.data for e in bench.of(EventKind.TASK_DONE) if e.task_id == task_id]
    assert isinstance(result, ResultData)
    return result.output_path


def logits_of(bench: Bench, task: TaskSpec, ids: torch.Tensor, exact: bool = True) -> torch.Tensor:
    """[n, V] of one sequence in the task's slot."""
    place = bench.state(task).place
    assert place is not None
    pool, slot = place
    assert isinstance(pool, SlotPool)
    backbone = bench.executor.backbones.get(task.model)
    sequence = EncodedSequence(ids.numpy(), np.ones(len(ids), dtype=bool))
    tensors = pack_for_slot(backbone, [sequence], pool, slot)
    backbone.state.current = AdapterPass(pool, tensors.rows, None, exact)
    try:
        with torch.no_grad():
            hidden_TD = backbone.hidden_TD(
                tensors.input_ids_T, tensors.position_ids_T, tensors.packed
            )
    finally:
        backbone.state.current = None
    return (hidden_TD @ backbone.lm_head_VD.T)[: len(ids)]


def train_alone(
    store: BackboneStore, folder: Path, task: TaskSpec, chunk_tokens: int = 24
) -> Weights:
    bench = Bench(folder, store)
    bench.run(make_plan([make_htask([task], chunk_tokens=chunk_tokens)]), task)
    return bench.weights(task)


def all_tasks() -> list[TaskSpec]:
    """With those methods that PEFT does not have.

    A bottleneck after k_proj is left out: softmax hardly sees a constant added to all keys, so its
    bias has a gradient of rounding size, which AdamW turns into steps (gaps of 1.6e-4 measured;
    1.4e-5 after gate_proj at rank 2).
    """
    some = ("v_proj", "o_proj", "down_proj")
    common = {"method": "bottleneck", "num_steps": STEPS, "lr": 3e-3}
    return [
        *mixed_tasks(),
        make_task("houlsby", **common, rank=5, targets=("o_proj", "down_proj")),
        make_task("after some", **common, rank=2, targets=some, batch_size=1, accumulation=3),
        make_task("dropped", **common, rank=4, targets=("o_proj", "down_proj"), dropout=0.4),
    ]


@pytest.fixture(scope="module")
def alone(store: BackboneStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    folder = tmp_path_factory.mktemp("alone")
    tasks = all_tasks()
    return {
        task.task_id: train_alone(store, folder / str(place), task)
        for place, task in enumerate(tasks)
    }


def test_company_of_other_methods_changes_no_bit(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights]
) -> None:
    tasks = all_tasks()[::-1]
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask(tasks, chunk_tokens=24)]), *tasks)
    for task in tasks:
        assert worst_gap(bench.weights(task), alone[task.task_id]) == 0.0, task.task_id


def test_padding_other_chunks_and_larger_slots_are_equal_to_rounding(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights]
) -> None:
    tasks = all_tasks()
    slots = [AdapterSlot(task.adapter.method, task.adapter.rank + 3, ALL) for task in tasks]
    bench = Bench(tmp_path, store)
    htask = make_htask(tasks, 40, 3, PackRule.PAD, slots)
    bench.run(make_plan([htask]), *tasks)
    for task in tasks:
        assert worst_gap(bench.weights(task), alone[task.task_id]) < 1e-5, task.task_id


def test_fast_mode_is_equal_to_rounding(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights]
) -> None:
    """The form with a fixed number of ops for any number of tasks."""
    tasks = all_tasks()
    bench = Bench(tmp_path, store, deterministic=False)
    bench.run(make_plan([make_htask(tasks, 32)]), *tasks)
    for task in tasks:
        assert worst_gap(bench.weights(task), alone[task.task_id]) < 1e-4, task.task_id


class HandMadeBottleneck(torch.nn.Module):
    """Two ``nn.Linear`` behind a frozen linear, by the definition."""

    def __init__(
        self, frozen: torch.nn.Module, rank: int, dropout: torch.nn.Module | None = None
    ) -> None:
        super().__init__()
        self.frozen, self.dropout = frozen, dropout or torch.nn.Identity()
        width: Any = getattr(frozen, "out_features", None) or frozen.nf  # Conv1D names it so
        self.bottleneck_down = torch.nn.Linear(width, rank)
        self.bottleneck_up = torch.nn.Linear(rank, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.frozen(x)
        inner = torch.relu(self.bottleneck_down(self.dropout(y)))
        return y + self.bottleneck_up(inner)


def hand_made(
    store: BackboneStore, task: TaskSpec, tensors: dict[str, torch.Tensor], now: Any = None
) -> Any:
    """A plain model with bottlenecks at the targets, holding ``tensors`` of a saved folder."""
    model = plain_copy(store.get("tiny").model).requires_grad_(False)
    rate = task.adapter.dropout if now is not None else 0.0
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in task.adapter.targets:
            parent = model.get_submodule(name.rpartition(".")[0])
            key = store.get("tiny").sites[name].key
            dropout = SeededDropout(key, rate, now) if rate else None
            made = HandMadeBottleneck(module, task.adapter.rank, dropout)
            setattr(parent, name.rpartition(".")[2], made)
    own = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    wrong = model.load_state_dict(own, strict=False)
    assert not wrong.unexpected_keys
    assert not [key for key in wrong.missing_keys if "bottleneck" in key]
    return model


def check_steps_by_hand(
    model: Any, lr: float, records: Sequence[Any], batch_of: Callable[[int], Batch]
) -> None:
    """AdamW on the whole model gives the losses and the norms of ``records``."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for step, record in enumerate(records):
        batch = batch_of(step)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert record.loss == pytest.approx(loss.item(), abs=1e-4), step
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-3), step


@pytest.mark.parametrize("task_id", ["houlsby", "after some", "dropped"])
def test_a_bottleneck_equals_two_linears_by_hand(
    store: BackboneStore, tmp_path: Path, task_id: str
) -> None:
    task = next(item for item in all_tasks() if item.task_id == task_id)
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask([*mixed_tasks()[:3], task], 24)]), *mixed_tasks()[:3], task)
    method, backbone = adapter_method("bottleneck"), store.get("tiny")
    start = AdapterBank(backbone, torch.float32).create(task, STEPS).parameters()
    tensors = {k: v for site in start for k, v in method.to_peft(site, start[site]).items()}
    now = SimpleNamespace(task=task, step=0, batch=None)
    model = hand_made(store, task, tensors, now)

    def batch_of(step: int) -> Batch:
        sequences = bench.library.step_sequences(task_id, step)
        now.step, now.batch = step, Batch(sequences, range(len(sequences)))
        return now.batch

    records = [record for record in bench.recorder.steps if record.task_id == task_id]
    check_steps_by_hand(model, task.optimizer.lr, records, batch_of)
    folder = Path(folder_of(bench, task_id))
    loaded = hand_made(store, task, load_file(folder / "adapter_model.safetensors")).eval()
    for tokens, _ in bench.library.validation(task_id):
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            theirs = loaded(input_ids=ids[None]).logits[0]
        torch.testing.assert_close(logits_of(bench, task, ids), theirs, rtol=1e-4, atol=1e-4)
    read = read_adapter(folder, task, backbone)
    for (site, name), values in bench.state(task).tensors.items():
        assert torch.equal(read[site][name], values.param)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_nan_stays_with_its_task(
    store: BackboneStore, tmp_path: Path, method: str, deterministic: bool
) -> None:
    """Two tasks of one method, one of them poisoned: the other trains on as if alone with it."""
    good, bad = (
        make_task(name, method=method, targets=targets_of(method), num_steps=3)
        for name in ("good", "bad")
    )
    kept = []
    for poison in (False, True):
        bench = Bench(tmp_path / str(poison), store, deterministic=deterministic)
        bench.prepare(good, bad)
        bench.executor.apply(make_plan([make_htask([bad, good])]))
        bench.until_step(good, 1)
        if poison:
            for values in bench.state(bad).tensors.values():
                values.param.fill_(float("nan"))
        bench.until_ended(good, bad)
        kept.append(bench.weights(good))
        assert [e.task_id for e in bench.of(EventKind.TASK_FAILED)] == (["bad"] if poison else [])
    assert worst_gap(kept[1], kept[0]) <= (0.0 if deterministic else 1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec("lora", options={"use_rslora": 1}), "use_rslora.*true or false"),
        (AdapterSpec("dora", rank=0), "adapter.rank"),
        (AdapterSpec("dora", dropout=1.0), "adapter.dropout.*number in"),
        (AdapterSpec("prefix"), "adapter.targets.*adapts no linear"),
        (AdapterSpec("prompt", targets=(), rank=0), "adapter.rank"),
        (AdapterSpec("prompt", targets=(), dropout=0.1), "adapter.dropout.*takes none"),
        (AdapterSpec("prefix", targets=(), options={"projection": 1}), "not projection"),
        (AdapterSpec("bottleneck", dropout=-0.1), "adapter.dropout.*number in"),
        (AdapterSpec("bottleneck", options={"activation": "gelu"}), "takes none, not activation"),
        (AdapterSpec("ia3", dropout=0.1), "adapter.dropout.*takes none"),
        (AdapterSpec("ia3", options={"colour": 1}), "colour"),
        (AdapterSpec("ia3", options={"feedforward_modules": "x"}), "list of targets"),
        (
            AdapterSpec("ia3", options={"feedforward_modules": ["down_proj"]}),
            "down_proj, which is no target",
        ),
    ],
)
def test_refuses_settings(spec: AdapterSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_method(spec.method).check(spec)


def test_task_files_take_the_methods_that_the_runtime_has() -> None:
    from muxtune.cost.ops import ADAPTER_METHODS

    assert set(task_file.METHODS) == set(METHODS) == set(task_file.METHOD_OPTIONS)
    assert set(METHODS) <= set(ADAPTER_METHODS)


def test_the_cost_model_counts_the_trained_numbers(store: BackboneStore) -> None:
    from muxtune.cost.ops import adapter_parameters

    bank = AdapterBank(store.get("tiny"), torch.float32)
    for task in all_tasks():
        if task.adapter.method != "ia3":  # counted as the wider of its two forms
            numbers = sum(t.param.numel() for t in bank.create(task, 1).tensors.values())
            assert numbers == adapter_parameters(TINY, adapter_slot(task)), task.task_id

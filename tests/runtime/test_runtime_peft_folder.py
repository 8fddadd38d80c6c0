"""The adapter's folder: PEFT loads it, it is whole or absent, and it can be read back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from muxtune.errors import DataError, OutputError
from muxtune.runtime.attention import pack_rows
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.bank import SlotPool
from muxtune.runtime.evaluate import perplexity
from muxtune.runtime.folders import find_folder, whole_folder
from muxtune.runtime.passes import AdapterPass
from muxtune.runtime.peft_io import read_adapter, write_adapter
from muxtune.runtime.training import score_pass
from muxtune.types import EventKind, ResultData, TaskSpec
from muxtune.workload.encoding import EncodedSequence
from muxtune_kernels import slot_rows
from tests.runtime.peft_reference import plain_copy
from tests.runtime.runtime_helpers import Bench, make_htask, make_plan, make_task


def train(folder: Path, store: BackboneStore, task: TaskSpec) -> tuple[Bench, Path]:
    bench = Bench(folder, store)
    bench.run(make_plan([make_htask([task])]), task)
    result = bench.of(EventKind.TASK_DONE)[0].data
    assert isinstance(result, ResultData)
    return bench, Path(result.output_path)


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("all-linear",)])
def test_peft_loads_it_with_the_same_logits(
    store: BackboneStore, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    from peft import PeftModel

    task = make_task("tuned", rank=3, alpha=7.0, targets=targets, num_steps=6)
    bench, folder = train(tmp_path, store, task)
    backbone = store.get("tiny")
    loaded = PeftModel.from_pretrained(plain_copy(backbone.model), folder).eval()
    sequences = bench.library.validation("tuned")
    for tokens, _ in sequences:
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            theirs = loaded(input_ids=ids[None]).logits[0]
        torch.testing.assert_close(our_logits(bench, task, ids), theirs, rtol=1e-4, atol=1e-4)
    score = partial(score_pass, backbone, deterministic=True)
    mine = perplexity(backbone, bench.state(task), sequences, 10**6, score)
    assert mine == pytest.approx(plain_perplexity(loaded, sequences), rel=1e-4)
    base = plain_perplexity(plain_copy(backbone.model).eval(), sequences)
    assert mine != pytest.approx(base, rel=1e-2)


def our_logits(bench: Bench, task: TaskSpec, ids: torch.Tensor) -> torch.Tensor:
    """[n, V] of one sequence in the task's slot, dropout off."""
    place = bench.state(task).place
    assert place is not None
    pool, slot = place
    assert isinstance(pool, SlotPool)
    backbone = bench.executor.backbones.get(task.model)
    rows = slot_rows([(slot, 0, len(ids))], len(ids), len(pool.slots))
    backbone.state.current = AdapterPass(pool, rows, None, True)
    try:
        with torch.no_grad():
            hidden_TD = backbone.hidden_TD(
                ids, torch.arange(len(ids)), pack_rows([(0, len(ids))], len(ids))
            )
    finally:
        backbone.state.current = None
    return hidden_TD @ backbone.lm_head_VD.T


def plain_perplexity(model: Any, sequences: Sequence[EncodedSequence]) -> float:
    nll, count = 0.0, 0
    for tokens, mask in sequences:
        ids = torch.from_numpy(tokens).long()[None]
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
        picked = scores.gather(1, ids[0, 1:, None])[:, 0]
        nll -= float(picked[torch.from_numpy(mask[:-1])].sum())
        count += int(mask.sum())
    return math.exp(nll / count)


def test_reads_back_what_it_wrote(store: BackboneStore, tmp_path: Path) -> None:
    task = make_task("tuned", rank=3)
    bench, folder = train(tmp_path, store, task)
    read = read_adapter(folder, task, store.get("tiny"))
    for (site, name), values in bench.state(task).tensors.items():
        assert torch.equal(read[site][name], values.param)
    with pytest.raises(DataError, match="holds no tensor"):
        read_adapter(folder, make_task("tuned", rank=3, targets=("o_proj",)), store.get("tiny"))
    with pytest.raises(DataError, match="cannot be read"):
        read_adapter(tmp_path / "nowhere", task, store.get("tiny"))


def test_config_names_targets_and_base(store: BackboneStore, tmp_path: Path) -> None:
    task = make_task("tuned", targets=("all-linear",))
    _, folder = train(tmp_path, store, task)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["r"] == 4 and config["lora_alpha"] == 8.0
    assert set(config["target_modules"]) == set(store.get("tiny").target_names)


def test_a_failed_write_leaves_nothing_and_names_the_path(
    store: BackboneStore, tmp_path: Path
) -> None:
    task = make_task("tuned")
    bench, _ = train(tmp_path / "run", store, task)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OutputError, match=r"output_dir: cannot write.*Free space"):
        write_adapter(blocked / "x", task, bench.state(task).parameters(), store.get("tiny"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
    assert blocked.read_text() == "in the way"


def test_a_full_disk_leaves_nothing_half_written(
    store: BackboneStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("tuned")
    bench, folder = train(tmp_path, store, task)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "adapter_model.safetensors")

    monkeypatch.setattr("muxtune.runtime.peft_io.write_tensors", full)
    with pytest.raises(OutputError, match="No space left"):
        write_adapter(folder, task, bench.state(task).parameters(), store.get("tiny"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["tuned"]


@pytest.mark.parametrize("moment", ["before the first rename", "between the renames"])
def test_a_kill_while_replacing_leaves_a_whole_folder(tmp_path: Path, moment: str) -> None:
    final = tmp_path / "state"
    with whole_folder(final) as partial:
        (partial / "value").write_text("old")
    if moment == "between the renames":
        final.rename(tmp_path / "state.replaced")
    else:
        (tmp_path / "state.partial").mkdir()
        (tmp_path / "state.partial" / "value").write_text("half")
    found = find_folder(final)
    assert found is not None and (found / "value").read_text() == "old"
    with whole_folder(final) as partial:
        (partial / "value").write_text("new")
    assert (final / "value").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]

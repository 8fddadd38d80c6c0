"""Shard sizes by construction on the meta device, on a small Llama."""

from __future__ import annotations

import pytest

from experiments.seventy_billion.meta import check_shards
from muxtune.cost.memory import MemoryModel
from muxtune.types import ReplicaShape

REPLICAS = [ReplicaShape(), ReplicaShape(3, 1), ReplicaShape(1, 2)]


def test_the_memory_model_counts_what_the_modules_hold():
    # Its head is tied, so a pipeline holds the matrix twice.
    found = check_shards("smollm2-135m", REPLICAS)
    assert found["parameters"] == 134_515_008 and len(found["shards"]) == 4
    pipelines = check_shards("llama-2-7b", [ReplicaShape(1, 3), ReplicaShape(4, 2)])
    assert pipelines["parameters"] == 6_738_415_616 and len(pipelines["shards"]) == 5


def test_a_wrong_ledger_is_noticed(monkeypatch: pytest.MonkeyPatch):
    right = MemoryModel.backbone_bytes
    monkeypatch.setattr(MemoryModel, "backbone_bytes", lambda *args: right(*args) + 2)
    with pytest.raises(AssertionError):
        check_shards("smollm2-135m", REPLICAS[:1])

"""The experiment that simulates the paper's figures: its parts on one small case."""

from __future__ import annotations

import pytest

from experiments.paper_figures.systems import (
    ablation,
    memory_bytes,
    ratios,
    step_times_s,
    zero_padded,
)
from experiments.paper_figures.testbeds import A40, DATA, MIXED, Assumptions, Case, books, view
from muxtune.types import ReplicaShape

CASE = Case(A40, "llama-2-7b", ReplicaShape(1, 4))
FEW = Assumptions(tasks=3, batch=4)


def test_every_system_is_costed_and_ours_is_not_slower_than_any():
    times = step_times_s(CASE, MIXED, FEW)
    assert set(times) == {"hf_peft", "nemo", "sl_peft", "muxtune"} and None not in times.values()
    assert min(ratios(times).values()) >= 1.0
    assert ratios(times)["hf_peft"] > ratios(times)["nemo"]  # eager kernels are never faster


def test_padding_to_the_longest_of_a_group():
    where = view(CASE, MIXED, FEW, books(CASE, FEW)[0])
    lengths = [task.lengths.max_tokens for task in where.tasks]
    assert lengths == list(DATA.values())
    names = [task.task_id for task in where.tasks]
    found = zero_padded(where, [names[:2], names[2:]])
    assert [task.lengths.max_tokens for task in found.tasks] == [128, 128, 256]
    assert zero_padded(where, [[name] for name in names]) == where


def test_switching_a_part_off_gains_nothing():
    lost = ablation(CASE, MIXED, FEW)
    assert set(lost) == {"fusion", "orchestration", "alignment", "alignment, all"}
    assert min(lost.values()) >= -1e-9 and lost["alignment, all"] > 0.1


def test_memory_grows_by_a_backbone_where_each_task_has_its_own():
    sizes = memory_bytes(CASE, "sst2", FEW)
    backbone = books(CASE, FEW)[0]("llama-2-7b", "A40").backbone_bytes(CASE.replica)
    assert sizes["nemo"][2] - sizes["nemo"][1] > backbone
    assert sizes["muxtune"][2] - sizes["muxtune"][1] < 0.2 * backbone
    assert sizes["muxtune"] == sorted(sizes["muxtune"])


def test_true_lengths_are_shorter_than_padded_ones():
    assumed = FEW._replace(true_lengths=True)
    costs, _ = books(CASE, assumed)
    for true, fixed in zip(
        view(CASE, MIXED, assumed, costs).tasks, view(CASE, MIXED, FEW, costs).tasks, strict=True
    ):
        assert true.lengths.mean_tokens < fixed.lengths.mean_tokens
        assert true.lengths.max_tokens <= fixed.lengths.max_tokens


@pytest.mark.parametrize(
    "changed", [{"eager_host_s": 0.0}, {"eager_host_s": 1e-6, "eager_traffic": 1.0}]
)
def test_eager_constants_move_the_eager_system_only(changed):
    before = step_times_s(CASE, "sst2", FEW)
    after = step_times_s(CASE, "sst2", FEW._replace(analytic=tuple(changed.items())))
    assert after["hf_peft"] < before["hf_peft"]  # type: ignore[operator]
    assert after["nemo"] == before["nemo"] and after["muxtune"] == before["muxtune"]

"""Static stages replayed in a plan's order give what one rank gives: losses and gradient norms."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from experiments.two_gpus.cases import NUM_TASKS, PIPELINE, SOLO, TENSOR, Config
from experiments.two_gpus.layouts import Weights
from experiments.two_gpus.run import (
    TINY,
    Rank,
    _loader,
    choose_order,
    chooser,
    last_metrics,
    make_visits,
)
from muxtune.runtime.distributed.layout import Layout
from muxtune.runtime.distributed.links import Links
from muxtune.runtime.distributed.order_runner import OrderRunner
from muxtune.runtime.distributed.peer_memory import PeerMemory
from muxtune.runtime.distributed.schedule import sequential_schedule
from muxtune.runtime.distributed.static_stage import _split_grads, _Squares
from muxtune.runtime.static_step import AdapterPools, SlotSpec
from muxtune.types import ReplicaShape
from tests.runtime.distributed_helpers import run_world

CONFIGS = {
    "one": Config(SOLO, "8", 1, "sequential"),
    "interleaved": Config(PIPELINE, "8", 1, "interleaved"),
    "accumulating": Config(PIPELINE, "8", 2, "1f1b"),
    "tensor": Config(TENSOR, "8", 1, "sequential"),
    "both": Config(ReplicaShape(2, 2), "8", 1, "interleaved"),
    "late": Config(PIPELINE, "8", 1, "interleaved", early=False),
    "copied": Config(PIPELINE, "8", 1, "interleaved"),
    "copied tensor": Config(TENSOR, "8", 1, "sequential"),
    "hosted": Config(PIPELINE, "8", 1, "interleaved"),
    "hosted tensor": Config(TENSOR, "8", 1, "interleaved"),
    "copied both": Config(ReplicaShape(2, 2), "8", 1, "interleaved"),
}


class Seen(NamedTuple):
    """Losses and gradient norms by task, after some rounds."""

    losses: torch.Tensor
    norms: torch.Tensor


def train(rank: int, config: Config, path: Path) -> None:
    """A single round, then three that overlap."""
    me = Rank(rank, torch.device("cpu"), torch.float32, TINY)
    layout, alone = Layout((config.replica,)), config.replica == SOLO
    place = layout.places[0 if alone else rank]
    links = None if alone else Links(layout, place, me.device)
    memory = None
    if path.name.startswith(("copied", "hosted")):
        hosted = path.name.startswith("hosted")
        memory = PeerMemory(rank, range(layout.world_size), me.device, 1 << 22, through_host=hosted)
    weights = Weights(TINY, config.replica, place.stage, place.part, me.device, me.dtype)
    part = weights.stage_part(*((links.tp, links.step) if links else (None, None)))
    visits = make_visits(config, me, weights, part)
    htasks = tuple(i // config.parts for i in range(len(visits.programs)))
    base = sequential_schedule(htasks, NUM_TASKS, TINY, config.replica)
    runner = OrderRunner(
        base, place.stage, visits.programs, links, _loader(visits), me.device,
        early=config.early, choose=chooser(visits), memory=memory,
    )  # fmt: skip
    assert any(len(programs) > 1 for programs in visits.programs)
    runner.prepare()
    if config.order != "sequential":
        runner.schedule, _ = choose_order(base.graph.problem, config, base)
    found = []
    for first, count in ((0, 1), (1, 3)):
        runner.run(count, first_round=first)
        metrics = last_metrics(visits, first + count - 1)
        found.append(torch.stack([torch.tensor(values)[:, 0] for values in metrics]))
    torch.save(found, path.with_name(f"{path.name}-{rank}.pt"))


def seen(path: Path, config: Config) -> list[Seen]:
    """Losses from the last stage, norms from the first; parts of a step together."""
    last_rank = Layout((config.replica,)).rank_of(0, config.replica.pp - 1, 0)
    first, last = (torch.load(path.with_name(f"{path.name}-{rank}.pt")) for rank in (0, last_rank))
    shape = (NUM_TASKS, config.parts)
    return [
        Seen(a[:, 0].view(shape).sum(1), b[:, 1].view(shape)[:, -1])
        for a, b in zip(last, first, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("static")
    run_world(2, train_each, [name for name in CONFIGS if "both" not in name], path)
    run_world(4, train_each, ["both", "copied both"], path)
    return path


def train_each(rank: int, names: list[str], folder: Path) -> None:
    for name in names:
        train(rank, CONFIGS[name], folder / name)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "one"])
def test_stages_give_what_one_rank_gives(folder: Path, name: str) -> None:
    one = seen(folder / "one", CONFIGS["one"])
    for mine, theirs in zip(seen(folder / name, CONFIGS[name]), one, strict=True):
        torch.testing.assert_close(mine.losses, theirs.losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(mine.norms, theirs.norms, rtol=1e-5, atol=0)


def test_squares_are_those_of_each_task() -> None:
    """Of slots of other ranks and targets."""
    part = Weights(TINY, SOLO, 0, 0, torch.device("cpu"), torch.float32).stage_part()
    slots = (SlotSpec(2), SlotSpec(5, ("q_proj", "down_proj")), SlotSpec(3, ("o_proj",)))
    pools = AdapterPools(part.model, slots, deterministic=True)
    grads = [[g for _, a, b in pools.views(slot) for g in (a[1], b[1])] for slot in range(3)]
    for grad in (grad for own in grads for grad in own):
        grad.normal_()
    expected = torch.stack([sum((g.square().sum() for g in own), torch.zeros(())) for own in grads])
    found = sum((_Squares(half, 3, expected.device)() for half in _split_grads(pools)), 0)
    torch.testing.assert_close(found, expected)

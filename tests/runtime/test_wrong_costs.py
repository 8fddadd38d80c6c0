"""The executor that trains corrects wrong predictions as soon as a plan changes."""

from __future__ import annotations

from pathlib import Path

from muxtune.cluster_policies.fifo_shared import FifoShared
from muxtune.cost.book import CostBook
from muxtune.cost.scaled import ScaledCostBook
from muxtune.engine import Engine, replay
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.planning.journal import Journal, read_journal
from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.executor import TorchExecutor
from muxtune.runtime.options import TorchOptions
from muxtune.types import InstanceSpec
from tests.runtime.runtime_helpers import TINY, DrawnText, make_task
from tests.runtime.test_replay_parity import Ticks
from tests.sim.test_wrong_profile import Watch

INSTANCE = InstanceSpec("gpu0", "tiny", "cpu", 8_000_000_000)
BOOK = ScaledCostBook(CostBook(models={"tiny": TINY}), 30.0)


def test_the_plan_after_the_first_end_knows_what_rounds_take(
    store: BackboneStore, tmp_path: Path
) -> None:
    """A round takes some reads of a clock that moves by a millisecond at each."""
    steps = {"a": 8, "b": 16, "c": 24}
    tasks = [make_task(name, num_steps=count) for name, count in steps.items()]
    executor = TorchExecutor(
        StepBuilder(), store, DrawnText(), TorchOptions(tmp_path, evaluate_tokens=0),
        clock_ns=Ticks(),
    )  # fmt: skip
    watch = Watch()
    with Journal(tmp_path / "journal.jsonl", {}, {}) as journal:
        planner = MuxTunePlanner(BOOK)
        engine = Engine(FifoShared(), planner, executor, tasks, [INSTANCE], journal, (watch,))
        engine.run()
    executor.close()
    first, *later = watch.errors()
    assert first > 3.0 and max(later) < 0.3, watch.errors()
    (drift,) = watch.drifts
    assert drift.epoch == 0 and drift.data.rounds == 8  # type: ignore[union-attr]
    batches = read_journal(tmp_path / "journal.jsonl").batches
    assert replay(batches, FifoShared(), MuxTunePlanner(BOOK)) == []

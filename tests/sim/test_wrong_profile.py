"""A profile that is wrong is found out by the run, and what is planned next is predicted better."""

from __future__ import annotations

import pytest

from muxtune.cluster_policies.fifo_shared import FifoShared
from muxtune.cost.book import CostBook
from muxtune.cost.scaled import ScaledCostBook
from muxtune.engine import Engine, QuietObserver
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.types import (
    NS_PER_S,
    DataSpec,
    Event,
    EventKind,
    InstanceSpec,
    Plan,
    ProgressData,
    TaskSpec,
)
from muxtune.workload.synthetic import SyntheticLibrary
from muxtune_sim import SimExecutor, SimOptions
from muxtune_sim.options import make_builder

BOOK = CostBook()
INSTANCE = InstanceSpec("g0", "llama-2-7b", "H100-SXM", 80 * 10**9)


class Watch(QuietObserver):
    """Predicted and measured seconds of a round, by epoch; and the drifts that were found."""

    def __init__(self) -> None:
        self.predicted_s: dict[int, float] = {}
        self.measured_s: dict[int, float] = {}
        self.drifts: list[Event] = []

    def on_plan(self, plan: Plan) -> None:
        self.predicted_s[plan.epoch] = plan.predicted.round_time_s.value

    def on_batch(self, time_ns: int, events) -> None:
        for event in events:
            if event.kind is EventKind.PROGRESS and isinstance(event.data, ProgressData):
                seconds = event.data.duration_ns / NS_PER_S / event.data.rounds
                self.measured_s[event.epoch] = seconds
            if event.kind is EventKind.DRIFT:
                self.drifts.append(event)

    def errors(self) -> list[float]:
        both = sorted(self.predicted_s.keys() & self.measured_s.keys())
        return [abs(self.predicted_s[key] / self.measured_s[key] - 1) for key in both]


def run(factor: float) -> tuple[Watch, Engine]:
    """The planner believes times off by ``factor``; the simulated device keeps to the right ones.
    Tasks join one by one, so that plans change and tell of their rounds."""
    tasks = [
        TaskSpec(
            f"t{index}",
            INSTANCE.model,
            data=DataSpec(histogram="openbookqa", max_length_tokens=256),
            num_steps=40,
            arrival_ns=index * NS_PER_S,
        )
        for index in range(4)
    ]
    options = SimOptions()
    executor = SimExecutor(make_builder(options), BOOK, SyntheticLibrary(0), options)
    watch = Watch()
    planner = MuxTunePlanner(ScaledCostBook(BOOK, factor))
    engine = Engine(FifoShared(), planner, executor, tasks, [INSTANCE], observers=(watch,))
    engine.run()
    return watch, engine


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_a_wrong_profile_is_corrected(factor: float) -> None:
    watch, engine = run(factor)
    errors = watch.errors()
    assert errors[0] == pytest.approx(abs(factor - 1), abs=0.1)
    assert max(errors[-2:]) < 0.1, errors
    assert watch.drifts, "observers are told"
    told = engine.fleet.records["g0"].corrections.time_percent
    assert told == pytest.approx(100 / factor, rel=0.1)


def test_a_right_profile_is_left_alone() -> None:
    watch, engine = run(1.0)
    assert not watch.drifts and engine.fleet.records["g0"].corrections.time_percent == 100

"""GPUs and nodes that fail, are repaired, and are taken back by their owner.

Nothing is drawn ahead: each GPU and each node has one pending event, and the next is drawn when
that has happened. A GPU is down while anything holds it down: itself, or its node.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from muxtune.hardware import FailureRules, NodeSpec
from muxtune.types import EventKind
from muxtune_sim.options import to_ns


class Site(Protocol):
    """The simulation around the hardware."""

    now_ns: int

    def later(self, delay_ns: int, call: Callable[[], None]) -> None: ...

    def gpus_changed(self, kind: EventKind, unit: Unit, gpu_ids: tuple[str, ...]) -> None:
        """GPUS_DOWN, GPUS_UP or GPUS_NOTICE; never without a GPU."""
        ...


class Unit(NamedTuple):
    """What fails together: a GPU, a node, or a spot node's lease."""

    name: str
    gpu_ids: tuple[str, ...]
    mean_up_s: float
    down_s: float
    notice_s: float
    message: str


class Hardware:
    """Draws the fates of ``nodes``, and adds up for how long each GPU was down."""

    def __init__(self, nodes: Sequence[NodeSpec], rules: FailureRules, site: Site) -> None:
        self._site = site
        self._holds: dict[str, int] = {}  # by GPU: what keeps it down
        self._down_since_ns: dict[str, int] = {}
        self._down_ns: dict[str, int] = {}
        for unit in units_of(nodes, rules):
            stream = random.Random(f"{rules.seed}/{unit.message}/{unit.name}")
            self._wait_for_failure(unit, stream)

    def is_up(self, gpu_ids: Sequence[str]) -> bool:
        return self._down_since_ns.keys().isdisjoint(gpu_ids)

    def down_ns(self, now_ns: int) -> dict[str, int]:
        """For how long each GPU that ever failed has been down."""
        total = dict(self._down_ns)
        for gpu, since_ns in self._down_since_ns.items():
            total[gpu] = total.get(gpu, 0) + now_ns - since_ns
        return total

    def _wait_for_failure(self, unit: Unit, stream: random.Random) -> None:
        up_ns = to_ns(stream.expovariate(1.0 / unit.mean_up_s))
        notice_ns = min(to_ns(unit.notice_s), up_ns)
        if notice_ns:
            self._site.later(up_ns - notice_ns, lambda: self._give_notice(unit, stream, notice_ns))
        else:
            self._site.later(up_ns, lambda: self._fail(unit, stream))

    def _give_notice(self, unit: Unit, stream: random.Random, notice_ns: int) -> None:
        up = tuple(gpu for gpu in unit.gpu_ids if gpu not in self._down_since_ns)
        if up:
            self._site.gpus_changed(EventKind.GPUS_NOTICE, unit, up)
        self._site.later(notice_ns, lambda: self._fail(unit, stream))

    def _fail(self, unit: Unit, stream: random.Random) -> None:
        fell = []
        for gpu in unit.gpu_ids:
            self._holds[gpu] = self._holds.get(gpu, 0) + 1
            if gpu not in self._down_since_ns:
                self._down_since_ns[gpu] = self._site.now_ns
                fell.append(gpu)
        if fell:
            self._site.gpus_changed(EventKind.GPUS_DOWN, unit, tuple(fell))
        self._site.later(to_ns(unit.down_s), lambda: self._repair(unit, stream))

    def _repair(self, unit: Unit, stream: random.Random) -> None:
        back = []
        for gpu in unit.gpu_ids:
            self._holds[gpu] -= 1
            if not self._holds[gpu]:
                since_ns = self._down_since_ns.pop(gpu)
                self._down_ns[gpu] = self._down_ns.get(gpu, 0) + self._site.now_ns - since_ns
                back.append(gpu)
        if back:
            self._site.gpus_changed(EventKind.GPUS_UP, unit, tuple(back))
        self._wait_for_failure(unit, stream)


def units_of(nodes: Sequence[NodeSpec], rules: FailureRules) -> list[Unit]:
    """All that can fail under the rules."""
    units = []
    for node in nodes:
        if rules.gpu_mtbf_s:
            units += [
                Unit(gpu, (gpu,), rules.gpu_mtbf_s, rules.gpu_repair_s, 0.0, "GPU failure")
                for gpu in node.gpu_ids
            ]
        if rules.node_mtbf_s:
            each = (rules.node_mtbf_s, rules.node_repair_s, 0.0, "node failure")
            units.append(Unit(node.node_id, node.gpu_ids, *each))
        if node.spot and rules.spot_lifetime_s:
            lease = (rules.spot_lifetime_s, rules.spot_absence_s, rules.spot_notice_s)
            units.append(Unit(node.node_id, node.gpu_ids, *lease, "spot reclaim"))
    return units

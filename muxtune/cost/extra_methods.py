"""What a block of a captured step takes longer for slots of methods other than LoRA.

A profile tells it by size (``muxtune.cost.fused_sites.extra_size``) and rows; a row of filler, or
of another method's slot, spares what was measured where half of the rows were filler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost.causes import LEAST
from muxtune.cost.composition import Tally, kept
from muxtune.cost.curves import Grid, Time
from muxtune.cost.profiled import Measured, TimeOf, leaf_of

EXTRA, _HALF = "extra_", "half_"  # of operations; where half of the rows are not the method's
_MOST_SPARED_BY_FILLER = 0.9  # of what another method adds


class ExtraTime(NamedTuple):
    """What a block takes more for slots of a method. ``spared_s``: of it where all rows are filler;
    ``least_s``: of it for the fewest rows, mostly launches."""

    method: str
    backward: bool
    time: Time
    spared_s: float
    least_s: float

    def put(self, block: Tally, filler: float) -> None:
        """``filler``: share of the rows."""
        whole_s = self.time.value_s - filler * self.spared_s
        least_s = min(self.least_s, whole_s)
        block.put(LEAST + self.method, self.backward, least_s)
        block.put(self.method, self.backward, whole_s - least_s)


class ExtraMethods:
    """Of a profile's operations on blocks of ``hidden`` features. ``time_of``: of an operation,
    with its interval; ``measured``: see ``muxtune.cost.profiled.Measured``."""

    def __init__(
        self, ops: Mapping[str, Any], hidden: int, time_of: TimeOf, measured: Measured
    ) -> None:
        self._ops, self._hidden = ops, hidden
        self._time_of, self._measured = time_of, measured
        self._grids: dict[str, Grid] = {}
        self._rows_s: dict[tuple[str, float], float] = {}

    def times(self, method: str, size: float, rows: float) -> Iterator[ExtraTime]:
        """Forward, then backward."""
        for backward, side in enumerate(("forward", "backward")):
            name = f"{EXTRA}{method}_{side}.{self._hidden}"
            time, least = self._time_of(name, (size, rows)), self._time_of(name, (size, 0.0))
            most_s = _MOST_SPARED_BY_FILLER * time.value_s
            spared_s = min(rows * self.row_s(name, size), most_s)
            yield ExtraTime(method, bool(backward), time, spared_s, least.value_s)

    def measured_time(self, name: str, size: tuple[float, ...]) -> Time:
        """What the fewest rows take is launches, whatever the width; the rest grows with it.
        ``size``: and rows."""
        measured, ratio, outside = self._measured(name)
        if measured not in self._grids:
            points = self._ops[measured]["points"]
            leaves = {(point["size"], point["rows"]): leaf_of(point) for point in points}
            self._grids[measured] = Grid.of(measured, leaves)
        grid = self._grids[measured]
        if not name.startswith(f"{EXTRA}prefix"):  # sizes count the width
            ratio = size[0] / grid.axes[0][0] if len(grid.axes[0]) == 1 else 1.0
        least, (value, width, beyond) = grid.at((size[0], 0.0)).value_s, grid.at(size)
        value = least + ratio * (value - least)
        return Time(max(value, 0.0), ratio * width, outside or beyond)

    def row_s(self, name: str, size: float) -> float:
        """What a row spares that is of none of the method's slots."""
        found = self._rows_s.get((name, size))
        return kept(self._rows_s, (name, size), self._row_s(name, size)) if found is None else found

    def _row_s(self, name: str, size: float) -> float:
        measured = self._measured(name)[0]
        all_rows = [point["rows"] for point in self._ops[measured]["points"]]
        half = self._ops.get(measured.replace(EXTRA, _HALF, 1))
        if half is None:  # as much as a row more takes
            low_s, high_s = (
                self.measured_time(name, (size, rows)).value_s
                for rows in (min(all_rows), max(all_rows))
            )
            return max(0.0, high_s - low_s) / max(1.0, max(all_rows) - min(all_rows))
        known, shares = [], []
        for point in sorted(half["points"], key=lambda point: point["size"]):
            whole_s = self.measured_time(measured, (point["size"], point["rows"])).value_s
            known.append(point["size"])
            shares.append(max(0.0, 1.0 - point["median_s"] / whole_s))
        rows, share = half["points"][0]["rows"], float(np.interp(size, known, shares))
        return share * self.measured_time(name, (size, rows)).value_s / (rows / 2)

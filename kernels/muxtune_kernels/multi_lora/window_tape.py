"""Products with windows among launches that are recorded once and repeated by address.

`Plan` repeats what `launching.Launcher` launched; such a product has descriptors of two buffers,
and may run on a stream of a higher priority, beside what is launched after it.
"""

# Triton makes its drivers as it starts, out of the type checker's sight.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launching
from ..launching import Tape


class Operand(NamedTuple):
    """What a product reads, [rows, features], `tile` of them at once, and the buffer that its ranks
    are the first columns (or rows) of; rows of both have the same stride."""

    own: Tensor
    ranks: Tensor
    tile: tuple[int, int]

    def descriptor(self) -> tuple[int, TensorDescriptor]:
        """(2 where the own one comes first in memory, else 3; what the copy engine is told)."""
        step = self.ranks.data_ptr() - self.own.data_ptr()
        base = self.own if step >= 0 else self.ranks
        shape = [2, *self.own.shape]
        strides = [max(16, abs(step)) // base.element_size(), *self.own.stride()]
        return 2 + (step < 0), TensorDescriptor(base, shape, strides, [1, *self.tile])


class ProductLaunch(NamedTuple):
    """A product that is ready to go. numbers: but for the operands' order, which come after them;
    is_urgent: on a stream of a higher priority, after what this stream has by now."""

    compiled: Any
    programs: int
    operands: tuple[Operand, Operand]
    out_tiles: TensorDescriptor
    tensors: tuple[Tensor, ...]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    is_urgent: bool


class Beside(NamedTuple):
    """A stream, one of a higher priority, and events that are used again and again: to make them
    anew takes the host longer than what waits for them."""

    current: torch.cuda.Stream
    urgent: torch.cuda.Stream
    begun: torch.cuda.Event
    done: torch.cuda.Event

    def fork(self) -> torch.cuda.Stream:
        """The urgent stream, which waits for what the current one has by now."""
        self.begun.record(self.current)
        self.begun.wait(self.urgent)
        return self.urgent

    def join(self) -> None:
        """What the current stream gets from now on waits for the urgent one."""
        self.done.record(self.urgent)
        self.done.wait(self.current)


# By stream: whoever else works on the same one only makes the urgent one wait longer.
_beside: dict[tuple[int, int], Beside] = {}
_urgent: dict[int, torch.cuda.Stream] = {}


def beside_current() -> Beside:
    """Of the current device and stream."""
    device = driver.active.get_current_device()
    key = device, driver.active.get_current_stream(device)
    found = _beside.get(key)
    if found is None:
        if device not in _urgent:
            _urgent[device] = torch.cuda.Stream(device, priority=-1)
        found = _beside[key] = Beside(
            torch.cuda.current_stream(device), _urgent[device], torch.cuda.Event(),
            torch.cuda.Event(),
        )  # fmt: skip
    return found


def _keep(known: dict[Any, Any], key: Any, found: Any) -> None:
    if len(known) >= launching._MOST_KEPT:
        known.clear()
    known[key] = found


class _Step(launching._Launch):
    """A product of a plan. operands: a descriptor's two buffers, and its tile; encoded: what the
    copy engine is told of the two, by addresses."""

    operands: tuple[tuple[int, int, tuple[int, int]], ...]
    encoded: tuple[dict[Any, Any], ...]
    is_urgent: bool

    def run(self, stream: int, buffers: list[Any], addresses: list[int]) -> None:
        assert self.entry is not None
        function, before, metas, in_one = self.entry
        firsts, tiles = [], []
        for (own, ranks, tile), known, meta in zip(
            self.operands, self.encoded, metas[:2], strict=True
        ):
            at = addresses[own], addresses[ranks]
            found = known.get(at)
            if found is None:
                found = _encoded(Operand(buffers[own], buffers[ranks], tile), meta)
                _keep(known, at, found)
            firsts.append(found[0])
            tiles += found[1]
        ((fields, out, known),) = self.descriptors
        found = known.get(addresses[out])
        if found is None:
            made = launching._descriptor(fields, buffers[out])
            found = list(make_tensordesc_arg(made, metas[2]))
            _keep(known, addresses[out], found)
        tiles += found
        values = [addresses[at] + offset for at, offset in self.places]
        numbers, constants = self.rest
        arguments = [*tiles, *values, *numbers, *firsts, *constants]
        if self.is_urgent:
            stream = beside_current().fork().cuda_stream
        function(*self.grid, stream, *before, *([arguments] if in_one else arguments))


def _encoded(operand: Operand, meta: Any) -> tuple[int, list[Any]]:
    first, descriptor = operand.descriptor()
    return first, list(make_tensordesc_arg(descriptor, meta))


class WindowTape(Tape):
    """A tape that takes products with windows, too."""

    def add_windowed(self, launch: ProductLaunch) -> None:
        out = launch.out_tiles.base
        read = [t for operand in launch.operands for t in (operand.own, operand.ranks)]
        at = self._starts([*read, out])
        places = [self._place(tensor.data_ptr()) for tensor in launch.tensors]
        entry = launching._entry_of(launch.compiled, 3)
        if at is None or entry is None or None in places:
            self.is_whole = False
            return
        fields = {**vars(launch.out_tiles), "base": None}
        step = _Step(
            launch.compiled, (launch.programs, 1, 1), ((fields, at[4], {}),),
            tuple(place for place in places if place is not None),
            (launch.numbers, launch.constants), entry,
        )  # fmt: skip
        (x, weight) = launch.operands
        step.operands = (at[0], at[1], x.tile), (at[2], at[3], weight.tile)
        step.encoded = {}, {}
        step.is_urgent = launch.is_urgent
        self._steps.append(step)

    def _starts(self, tensors: Sequence[Tensor]) -> list[int] | None:
        """The buffers that begin where these do."""
        found = [self._place(tensor.data_ptr()) for tensor in tensors]
        starts = [place[0] for place in found if place is not None and place[1] == 0]
        return starts if len(starts) == len(tensors) else None

"""Launches of Triton kernels with little host time.

Triton's own call looks at every argument anew: 50 to 150 microseconds of Python a launch, which is
what an eager call of a linear waits for up to 8,192 rows. Here everything that a compiled kernel
depends on is one key, looked up once, and what it gives is launched directly, as
`JITFunction.run` does at its end. A whole sequence of launches that depends on shapes only is
recorded the first time and repeated by its buffers' addresses alone (`Tape`, `Plan`).
"""

# Triton makes its drivers and settings as it starts, out of the type checker's sight.
# pyright: reportAttributeAccessIssue=false

import itertools
import operator
import threading
from collections.abc import Sequence
from functools import reduce
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

# Whose compiled kernels are launched the way that it is done here.
_KNOWN_TRITON = triton.__version__.startswith(("3.6.", "3.7."))
_MOST_KEPT = 4096  # launches of different shapes; an eager caller may never come to an end


class Tiles(NamedTuple):
    """A tensor that a kernel reads or writes by the tensor copy engine, `rows` x `columns` at once.
    Its address and its rows must be multiples of 16 bytes."""

    tensor: Tensor
    rows: int
    columns: int


class _Known(NamedTuple):
    """A compiled kernel, and its descriptors without their tensors."""

    compiled: Any
    descriptors: tuple[dict[str, Any], ...]


class Launcher:
    """A Triton kernel whose arguments come in this order: tiles, tensors, numbers, constants."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._is_known = _KNOWN_TRITON and isinstance(kernel, JITFunction)  # not interpreted
        self._known: dict[Any, _Known] = {}

    def __call__(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[int, ...],
        constants: tuple[Any, ...], num_warps: int, num_stages: int = 3,
        tiles: tuple[Tiles, ...] = (),
    ) -> None:  # fmt: skip
        """tensors: as pointers. constants: the kernel's constexprs."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        # Triton compiles a kernel of its own for each set of addresses that are not aligned.
        is_aligned = not reduce(operator.or_, addresses) & 15
        if not (self._is_known and is_aligned) or _is_hooked() or self._kernel.pre_run_hooks:
            self._plainly(grid, tensors, numbers, constants, num_warps, num_stages, tiles)
            return
        device = driver.active.get_current_device()
        key = (
            device, num_warps, num_stages, numbers, constants, *[t.dtype for t in tensors],
            *[(t.shape, t.stride(), t.dtype, rows, columns) for t, rows, columns in tiles],
        )  # fmt: skip
        known = self._known.get(key)
        if known is None:
            found = self._plainly(grid, tensors, numbers, constants, num_warps, num_stages, tiles)
            self._remember(key, found, tiles)
            return
        based = [(fields, tile[0]) for fields, tile in zip(known.descriptors, tiles, strict=True)]
        stream = driver.active.get_current_stream(device)
        _run(known.compiled, grid, stream, based, addresses, (*numbers, *constants))
        tape = _recorded.tape
        if tape is not None:
            tape.add(known, grid, tiles, addresses, (*numbers, *constants))

    def _plainly_only(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[int, ...],
        constants: tuple[Any, ...], num_warps: int, num_stages: int = 3,
        tiles: tuple[Tiles, ...] = (),
    ) -> None:  # fmt: skip
        """As the call, remembering nothing."""
        self._plainly(grid, tensors, numbers, constants, num_warps, num_stages, tiles)

    def _plainly(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[int, ...],
        constants: tuple[Any, ...], num_warps: int, num_stages: int, tiles: tuple[Tiles, ...],
    ) -> Any:  # fmt: skip
        if _recorded.tape is not None:
            _recorded.tape.is_whole = False
        descriptors = [TensorDescriptor.from_tensor(t, [rows, cols]) for t, rows, cols in tiles]
        return self._kernel[grid](
            *descriptors, *tensors, *numbers, *constants, num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip

    def _remember(self, key: Any, compiled: Any, tiles: tuple[Tiles, ...]) -> None:
        if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
            return
        if len(self._known) >= _MOST_KEPT:
            self._known.clear()
        descriptors = (TensorDescriptor.from_tensor(t, [rows, cols]) for t, rows, cols in tiles)
        fields = tuple({**vars(found), "base": None} for found in descriptors)
        self._known[key] = _Known(compiled, fields)


def _run(
    compiled: Any, grid: tuple[int, int, int], stream: int,
    based: list[tuple[dict[str, Any], Tensor]], addresses: list[int], rest: tuple[Any, ...],
) -> None:  # fmt: skip
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *[_descriptor(fields, tensor) for fields, tensor in based], *addresses, *rest,
    )  # fmt: skip


def _descriptor(fields: dict[str, Any], tensor: Tensor) -> TensorDescriptor:
    made = object.__new__(TensorDescriptor)  # what was checked once is not checked again
    made.__dict__ = {**fields, "base": tensor}
    return made


def _is_hooked() -> bool:
    """Whether somebody (a profiler) wants to see the launches: then Triton's own call is right."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class _Recorded(threading.local):
    """The thread's tape: a backward pass runs on a thread of its own."""

    tape: "Tape | None" = None


_recorded = _Recorded()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty; a tape that is recorded takes note."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if _recorded.tape is not None:
        _recorded.tape.allocated(tensor)
    return tensor


def add_product(out: Tensor, left: Tensor, right: Tensor, transposed: bool = False) -> Tensor:
    """out += left @ right (or its transpose) by the library; a tape that is recorded takes note."""
    out.addmm_(left, right.t() if transposed else right)
    if _recorded.tape is not None:
        _recorded.tape.add_product(out, left, right, transposed)
    return out


class _Entry(NamedTuple):
    """The C function at the end of Triton's launches, and what it takes between the stream and the
    kernel's arguments. metas: how each descriptor is encoded. in_one: arguments are one list."""

    function: Any
    before: tuple[Any, ...]
    metas: tuple[Any, ...]
    in_one: bool


def _entry_of(compiled: Any, num_tiles: int) -> _Entry | None:
    """None where the launcher is not the one that is known."""
    run = compiled.run
    is_known = all(hasattr(run, name) for name in ("launch", "launch_pdl", "global_scratch_size"))
    if not is_known or run.global_scratch_size or run.profile_scratch_size:
        return None
    around = [cell.cell_contents for cell in getattr(run.launch, "__closure__", None) or ()]
    functions = [f for f in (run.launch, *around) if isinstance(f, BuiltinFunctionType)]
    metas = [tuple(found) for found in around if isinstance(found, list)] or [()]
    if len(functions) != 1 or len(metas) != 1 or len(metas[0]) != num_tiles or None in metas[0]:
        return None
    first = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    if hasattr(run, "arg_annotations"):  # Triton 3.7
        before = (*first, compiled.packed_metadata, *(None,) * 5, run.arg_annotations)
        return _Entry(functions[0], (*before, run.kernel_signature), metas[0], True)
    before = (*first, None, None, compiled.packed_metadata, *(None,) * 3)
    return _Entry(functions[0], before, metas[0], False)


class _Launch(NamedTuple):
    """descriptors: fields, buffer, and what was encoded by address. places: buffer and bytes from
    its start."""

    compiled: Any
    grid: tuple[int, int, int]
    descriptors: tuple[tuple[dict[str, Any], int, dict[int, list[Any]]], ...]
    places: tuple[tuple[int, int], ...]
    rest: tuple[Any, ...]
    entry: _Entry | None

    def run(self, stream: int, buffers: list[Any], addresses: list[int]) -> None:
        values = [addresses[at] + offset for at, offset in self.places]
        if self.entry is None:
            based = [(fields, buffers[at]) for fields, at, _ in self.descriptors]
            _run(self.compiled, self.grid, stream, based, values, self.rest)
            return
        function, before, metas, in_one = self.entry
        encoded: list[Any] = []
        for (fields, at, known), meta in zip(self.descriptors, metas, strict=True):
            found = known.get(addresses[at])
            if found is None:
                if len(known) >= _MOST_KEPT:
                    known.clear()
                found = make_tensordesc_arg(_descriptor(fields, buffers[at]), meta)
                known[addresses[at]] = found
            encoded += found
        arguments = [*encoded, *values, *self.rest]
        function(*self.grid, stream, *before, *([arguments] if in_one else arguments))


class _Product(NamedTuple):
    """Of buffers."""

    out: int
    left: int
    right: int
    transposed: bool


class Plan(NamedTuple):
    """Launches in order that depend on nothing but the addresses of their buffers: first those
    that are given, then those that never change, then those that are allocated."""

    steps: tuple[_Launch | _Product, ...]
    fixed: tuple[Tensor, ...]
    fixed_addresses: tuple[int, ...]
    allocations: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    outputs: tuple[tuple[int, tuple[int, ...] | None], ...]

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """The outputs; None, and nothing done, where it must be done the ordinary way."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in inputs]
        if reduce(operator.or_, addresses) & 15 or _is_hooked():
            return None
        device = self.fixed[0].device
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.allocations]
        addresses += self.fixed_addresses
        addresses += [tensor.data_ptr() for tensor in made]
        buffers: list[Any] = [*inputs, *self.fixed, *made]
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        for step in self.steps:
            if isinstance(step, _Launch):
                step.run(stream, buffers, addresses)
            else:
                right = buffers[step.right].t() if step.transposed else buffers[step.right]
                buffers[step.out].addmm_(buffers[step.left], right)
        return [
            None if at < 0 else buffers[at] if shape is None else buffers[at].view(shape)
            for at, shape in self.outputs
        ]


class Tape:
    """Records launches while it is entered. inputs: what may lie elsewhere the next time; fixed:
    what never does. It keeps what is allocated, so that no address is given twice."""

    def __init__(self, inputs: Sequence[Tensor | None], fixed: Sequence[Tensor]) -> None:
        self.is_whole = not _overlap([t for t in inputs if t is not None])
        self._inputs, self._fixed = len(inputs), tuple(fixed)
        self._buffers: list[Tensor | None] = [*inputs, *fixed]
        self._steps: list[_Launch | _Product] = []

    def __enter__(self) -> "Tape":
        _recorded.tape = self
        return self

    def __exit__(self, *_: object) -> None:
        _recorded.tape = None

    def allocated(self, tensor: Tensor) -> None:
        self._buffers.append(tensor)

    def add(
        self, known: _Known, grid: tuple[int, int, int], tiles: tuple[Tiles, ...],
        addresses: list[int], rest: tuple[Any, ...],
    ) -> None:  # fmt: skip
        places = [self._place(address) for address in addresses]
        based = [self._place(tile.tensor.data_ptr()) for tile in tiles]
        if None in places or not all(place and place[1] == 0 for place in based):
            self.is_whole = False
            return
        descriptors = tuple(
            (fields, place[0], {})
            for fields, place in zip(known.descriptors, based, strict=True)
            if place is not None
        )
        found = tuple(place for place in places if place is not None)
        entry = _entry_of(known.compiled, len(tiles))
        self._steps.append(_Launch(known.compiled, grid, descriptors, found, rest, entry))

    def add_product(self, out: Tensor, left: Tensor, right: Tensor, transposed: bool) -> None:
        """Of whole buffers."""
        operands = (out, left, right)
        at = [i for o in operands for i, buffer in enumerate(self._buffers) if buffer is o]
        self.is_whole &= len(at) == 3
        if self.is_whole:
            self._steps.append(_Product(at[0], at[1], at[2], transposed))

    def plan(self, outputs: Sequence[Tensor | None]) -> Plan | None:
        """What was recorded; None where not all of it could be."""
        found = [self._output(tensor) for tensor in outputs]
        first = self._inputs + len(self._fixed)
        made = [tensor for tensor in self._buffers[first:] if tensor is not None]
        if not self.is_whole:
            return None
        return Plan(
            tuple(self._steps), self._fixed, tuple(t.data_ptr() for t in self._fixed),
            tuple((tuple(t.shape), t.dtype) for t in made), tuple(found),
        )  # fmt: skip

    def _output(self, tensor: Tensor | None) -> tuple[int, tuple[int, ...] | None]:
        """Its buffer, and the shape that it has there."""
        if tensor is None:
            return -1, None
        place = self._place(tensor.data_ptr())
        if place is None or place[1] or not tensor.is_contiguous():
            self.is_whole = False
            return -1, None
        buffer = self._buffers[place[0]]
        is_same = buffer is not None and buffer.shape == tensor.shape
        return place[0], None if is_same else tuple(tensor.shape)

    def _place(self, address: int) -> tuple[int, int] | None:
        for at, tensor in enumerate(self._buffers):
            if tensor is not None and 0 <= address - tensor.data_ptr() < _extent_bytes(tensor):
                return at, address - tensor.data_ptr()
        return None


def _extent_bytes(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * (1 + sum((size - 1) * stride for size, stride in pairs))


def _overlap(tensors: list[Tensor]) -> bool:
    """Whether two of them share memory (or one has none): which is which is not certain then."""
    spans = sorted((tensor.data_ptr(), _extent_bytes(tensor)) for tensor in tensors)
    following = itertools.pairwise(spans)
    return any(span[1] == 0 for span in spans) or any(a + n > b for (a, n), (b, _) in following)

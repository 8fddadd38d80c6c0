"""Launches of Triton kernels with little host time.

Triton's own call looks at every argument anew: 50 to 150 microseconds of Python a launch, which is
what an eager call of a linear waits for up to 8,192 rows. Here everything that a compiled kernel
depends on is one key, looked up once, and what it gives is launched directly, as
`JITFunction.run` does at its end.
"""

import operator
from functools import reduce
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

# Whose compiled kernels are launched the way that `_launch` does it.
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
        if not (self._is_known and is_aligned) or _is_hooked(self._kernel):
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
        descriptors = [
            _descriptor(fields, tile[0])
            for fields, tile in zip(known.descriptors, tiles, strict=True)
        ]
        compiled, stream = known.compiled, driver.active.get_current_stream(device)
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *descriptors, *addresses, *numbers, *constants,
        )  # fmt: skip

    def _plainly(
        self, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[int, ...],
        constants: tuple[Any, ...], num_warps: int, num_stages: int, tiles: tuple[Tiles, ...],
    ) -> Any:  # fmt: skip
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


def _descriptor(fields: dict[str, Any], tensor: Tensor) -> TensorDescriptor:
    """What was checked when its like was made is not checked again."""
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**fields, "base": tensor}
    return made


def _is_hooked(kernel: Any) -> bool:
    """Whether somebody (a profiler) wants to see the launches: then Triton's own call is right."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return bool(getattr(kernel, "pre_run_hooks", ()))

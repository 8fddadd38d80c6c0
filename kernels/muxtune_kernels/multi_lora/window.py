"""The multi-task low-rank linear as two products that are a few steps longer than the weight.
16-bit tensors on CUDA, fast mode; no dropout, no bias.

    linear = linear_with_windows(weight_OD, slot_ranks)      # once
    linear.refresh(a_RD, b_RO)                               # after each change of the factors
    rows = rows_with_windows(slot_rows, scale_S, linear)     # once a micro-batch
    y_TO, h_TJ = linear.forward(x_TD, rows)
    dx_TD, da_RD, db_RO = linear.backward(dy_TO, x_TD, h_TJ, a_RD, b_RO, rows)

Packed rows come slot by slot, so the ranks of the slots that meet in a tile of rows are neighbours
among all ranks: a window. A product

    y  = [x | h] [W | B]^T          dx = [dy | dh] [W ; A]

runs on over its tile's window (64 ranks a step), wherever that lies among the factors. So it has no
epilogue of its own, and its cost does not grow with the number of tasks. x, the weight and dy are
as they are: h and the factors lie in buffers of their own whose rows have the same stride, and the
copy engine takes the way from the one to the other as one step of a third dimension.

dA and dB are made by small kernels that fit beside the second product on its multiprocessors: it
runs on a stream of a higher priority, with three stages in place of four.

A factor that is not finite is zeroed where products read it, and its own slot's h poisoned, so
nothing crosses slots. Features are multiples of 64, those of several members (linears that share
x) of 256.

Shape suffixes: T rows, D input features, O output features, P rows of a buffer, J columns of the
compact h, R pool rows, S slots, I tiles of rows, B blocks.
"""

# Triton makes its drivers as it starts, out of the type checker's sight.
# pyright: reportAttributeAccessIssue=false

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launching
from ..launching import Launcher, empty
from ..rows import SlotRows
from .launch import (
    Adapters,
    GradTargets,
    Layout,
    RowTensors,
    layout_of,
    outer,
)
from .launch import _total as total
from .tuning import INTERPRETED, Tuning, cdiv, next_power_of_2, num_sms, tuning_of
from .window_kernels import (
    place_factors_kernel,
    window_linear_kernel,
    window_shrink_kernel,
    window_table_kernel,
)
from .window_tape import Operand, ProductLaunch, WindowTape, beside_current

_place, _table = Launcher(place_factors_kernel), Launcher(window_table_kernel)
_shrink = Launcher(window_shrink_kernel)
_BLOCK_N = 512
WINDOW = 64  # ranks a step, as many as reduced features
TILE_T = 128
_TILE_N = 256
_GROUP_T = 8


class Factors(NamedTuple):
    """A frozen weight, and where products read the factors: rows have the weight's stride."""

    weight_OD: Tensor
    a_PD: Tensor
    bt_OD: Tensor
    bad_S: Tensor


class Window(NamedTuple):
    """The first rank and the steps of each tile of rows; the same for all linears whose slots have
    these ranks. room: columns of h (for each member) that hold any tile's."""

    table_I2: Tensor
    room: int


class RowsWithWindows(NamedTuple):
    """The rows of a micro-batch, for all linears whose slots have the same ranks."""

    rows: RowTensors
    window: Window


class LinearWithWindows(NamedTuple):
    """A frozen weight, and the ranks of the slots that adapt it."""

    factors: Factors
    adapters: Adapters

    def refresh(self, a_RD: Tensor, b_RO: Tensor) -> None:
        """The factors, as they are now. a_RD: [M * R, D]."""
        place_factors(self.factors, a_RD, b_RO, self.adapters)

    def forward(self, x_TD: Tensor, rows: RowsWithWindows) -> tuple[Tensor, Tensor]:
        """(y_TO, h_TJ). x_TD: contiguous."""
        factors, (row_tensors, window) = self.factors, rows
        layout = layout_of(self.adapters, x_TD.device)
        beside_TD = empty(tuple(x_TD.shape), x_TD.dtype, x_TD.device)
        h_TJ = window_shrink(
            x_TD, factors.a_PD, factors.bad_S, beside_TD, row_tensors, window, layout,
            self.tuning(x_TD),
        )  # fmt: skip
        y_TO = empty((x_TD.shape[0], factors.weight_OD.shape[0]), x_TD.dtype, x_TD.device)
        x = Operand(x_TD, beside_TD, (TILE_T, WINDOW))
        weight = Operand(factors.weight_OD, factors.bt_OD, (_TILE_N, WINDOW))
        window_linear(x, weight, y_TO, window, layout, True)
        return y_TO, h_TJ

    def backward(
        self, dy_TO: Tensor, x_TD: Tensor, h_TJ: Tensor, a_RD: Tensor, b_RO: Tensor,
        rows: RowsWithWindows,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dx_TD, dA [M * R, D], dB [R, O]). dy_TO: contiguous."""
        found = self.launch_backward(dy_TO, x_TD, h_TJ, a_RD, b_RO, rows)
        self.end_backward(x_TD.device)
        return found

    def launch_backward(
        self, dy_TO: Tensor, x_TD: Tensor, h_TJ: Tensor, a_RD: Tensor, b_RO: Tensor,
        rows: RowsWithWindows,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """`backward` but for its end: dx may still be made on another stream."""
        dh_TJ, beside_TO = self.shrink_dy(dy_TO, b_RO, rows)
        # The product first, or small kernels would fill the multiprocessors before it.
        dx_TD = self.input_grad(dy_TO, beside_TO, rows, _has_streams(x_TD.device))
        return dx_TD, *self.factor_grads(dh_TJ, h_TJ, dy_TO, x_TD, a_RD, b_RO, rows)

    def shrink_dy(
        self, dy_TO: Tensor, b_RO: Tensor, rows: RowsWithWindows
    ) -> tuple[Tensor, Tensor]:
        """(dh_TJ, the buffer beside dy that `input_grad` reads it from)."""
        layout = layout_of(self.adapters, dy_TO.device)
        beside_TO = empty(tuple(dy_TO.shape), dy_TO.dtype, dy_TO.device)
        dh_TJ = window_shrink(
            dy_TO, b_RO, self.factors.bad_S, beside_TO, rows.rows, rows.window, layout,
            self.tuning(dy_TO), is_dy=True,
        )  # fmt: skip
        return dh_TJ, beside_TO

    def input_grad(
        self, dy_TO: Tensor, beside_TO: Tensor, rows: RowsWithWindows, is_urgent: bool = False,
        stages: int = 3,
    ) -> Tensor:  # fmt: skip
        """dx_TD. stages: three leave room for small kernels beside it, four are a little faster."""
        factors, layout = self.factors, layout_of(self.adapters, dy_TO.device)
        width = factors.weight_OD.shape[1]
        dx_TD = empty((dy_TO.shape[0], width), dy_TO.dtype, dy_TO.device)
        dy = Operand(dy_TO, beside_TO, (TILE_T, WINDOW))
        weight = Operand(factors.weight_OD, factors.a_PD, (WINDOW, _TILE_N))
        window_linear(dy, weight, dx_TD, rows.window, layout, False, 3, is_urgent)
        return dx_TD

    def factor_grads(
        self, dh_TJ: Tensor, h_TJ: Tensor, dy_TO: Tensor, x_TD: Tensor, a_RD: Tensor,
        b_RO: Tensor, rows: RowsWithWindows, targets: GradTargets | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(dA [M * R, D], dB [R, O]), by kernels that fit beside a product of three stages."""
        adapters, layout = self.adapters, layout_of(self.adapters, x_TD.device)
        small = beside_tuning(self.tuning(x_TD), len(adapters.slot_ranks), layout.j_width)
        da_RD = outer(dh_TJ, x_TD, a_RD, rows.rows, adapters, layout, small, targets)
        return da_RD, self._db(h_TJ, dy_TO, b_RO, rows, layout, small, targets)

    def _db(
        self, h_TJ: Tensor, dy_TO: Tensor, b_RO: Tensor, rows: RowsWithWindows, layout: Layout,
        tuning: Tuning, targets: GradTargets | None,
    ) -> Tensor:  # fmt: skip
        """By a read of dy of its own, a member at a time."""
        one, start, found = layout._replace(num_members=1), 0, []
        direct = targets if tuning.da_splits == 1 or layout.num_members == 1 else None
        for member, width in enumerate(self.adapters.out_features):
            own = slice(start, start + width)
            h_part, start = h_TJ[:, member * layout.rank_pad :], start + width
            to = direct and direct._replace(da_RD=direct.db_RO[:, own])
            found.append(
                outer(h_part, dy_TO[:, own], b_RO[:, own], rows.rows, self.adapters, one, tuning,
                      to)
            )  # fmt: skip
        if direct is not None:
            return direct.db_RO
        db_RO = found[0] if len(found) == 1 else torch.cat(found, 1)
        if targets is not None:
            total(db_RO[None], db_RO, layout, (targets.db_RO, targets.keep_S))
        return db_RO

    def end_backward(self, device: torch.device) -> None:
        if _has_streams(device):
            beside_current().join()

    def tuning(self, x_TD: Tensor) -> Tuning:
        layout = layout_of(self.adapters, x_TD.device)
        return window_tuning(
            x_TD.shape[0], self.factors.weight_OD.shape[1], self.adapters.out_features,
            len(self.adapters.slot_ranks), layout.rank_pad, x_TD.element_size(),
        )  # fmt: skip


def linear_with_windows(
    weight_OD: Tensor, slot_ranks: tuple[int, ...], out_features: tuple[int, ...] | None = None,
    bt_OD: Tensor | None = None,
) -> LinearWithWindows:  # fmt: skip
    """out_features: of the members that share x, as in `multi_lora_linear_group`. bt_OD: where B^T
    goes, zeros [O, at least the sum of the ranks and 64], rows as far apart as the weight's:
    linears of one shape may have theirs side by side in one buffer; None: a buffer of the weight's
    size of its own. Raises ValueError where the copy engine could not read what it must."""
    num_out, width = weight_OD.shape
    adapters = Adapters(slot_ranks, out_features or (num_out,))
    problem = _problem(adapters, weight_OD)
    if problem:
        raise ValueError(f"{problem}; use multi_lora_linear_group")
    ranks, members = sum(slot_ranks), len(adapters.out_features)
    a_PD = weight_OD.new_zeros((members * ranks + WINDOW, width))
    if bt_OD is None:
        bt_OD = weight_OD.new_zeros((num_out, width))
    bad_S = torch.zeros((len(slot_ranks),), dtype=torch.int32, device=weight_OD.device)
    return LinearWithWindows(Factors(weight_OD, a_PD, bt_OD, bad_S), adapters)


def fits(weight_OD: Tensor, slot_ranks: tuple[int, ...], out_features: tuple[int, ...]) -> bool:
    """Whether `linear_with_windows` takes them."""
    return not _problem(Adapters(slot_ranks, out_features), weight_OD)


def _problem(adapters: Adapters, weight_OD: Tensor) -> str:
    (num_out, width), members = weight_OD.shape, adapters.out_features
    if sum(members) != num_out or not weight_OD.is_contiguous():
        return f"weight_OD {num_out, width} is not contiguous or not as wide as members {members}"
    if width % 64 or num_out % 64 or (len(members) > 1 and any(n % 256 for n in members)):
        return f"{width} features to {members}: windows want multiples of 64, several members 256"
    if len(members) * window_room(adapters) > min(width, num_out):
        ranks = f"{sum(adapters.slot_ranks)} ranks of {len(members)} members"
        return f"{ranks} do not fit beside {width} features to {members}"
    return ""


def rows_with_windows(
    rows: SlotRows, scale_S: Tensor, linear: LinearWithWindows
) -> RowsWithWindows:
    """Raises ValueError where the rows have no bounds (`slot_bounds`)."""
    if rows.slot_bounds_S3 is None:
        raise ValueError("slot_bounds_S3 is None: make it with slot_bounds(slot_of_row_T, slots)")
    tensors = RowTensors(rows.slot_of_row_T, rows.slot_bounds_S3, scale_S.float(), None)
    return RowsWithWindows(tensors, window_of(tensors, linear.adapters))


def window_tuning(
    num_rows: int, width: int, out_features: tuple[int, ...], num_slots: int, rank_pad: int,
    itemsize: int,
) -> Tuning:  # fmt: skip
    tuning = tuning_of(num_rows, width, out_features, num_slots, rank_pad, itemsize, False)
    if num_rows < 6144:  # nobody could add up parts of h: it is cut into more tiles instead
        # Five stages of it, with float32 factors, must fit the shared memory.
        shrink_k = max(64, min(256, 8192 // rank_pad))
        tuning = tuning._replace(shrink_t=16, shrink_k=shrink_k, shrink_stages=6)
    if cdiv(max(out_features), tuning.db_n) * num_slots >= 128:  # and no parts of dB to add up
        tuning = tuning._replace(db_splits=1)
    return tuning


def beside_tuning(tuning: Tuning, num_slots: int, j_width: int) -> Tuning:
    """Of dA and dB beside a product: few registers, and at most 41 KB of shared memory of the 50
    that its three stages leave. Few slots: their rows are cut into pieces, which are added up."""
    da_n = 64 if num_slots < 16 else 128
    a_row_bytes = 4 * 2 * (da_n + next_power_of_2(j_width))  # four stages of 16-bit numbers
    da_t = max(16, next_power_of_2(_BESIDE_BYTES // a_row_bytes + 1) // 2)
    return tuning._replace(da_n=da_n, da_t=da_t, da_splits=max(1, 4 // num_slots), da_stages=4)


_BESIDE_BYTES = 41 << 10


def window_room(adapters: Adapters) -> int:
    return cdiv(sum(adapters.slot_ranks), WINDOW) * WINDOW


def window_of(rows: RowTensors, adapters: Adapters) -> Window:
    """Once a micro-batch."""
    layout = layout_of(adapters, rows.slot_of_row_T.device)
    num_rows = rows.slot_of_row_T.numel()
    tiles = cdiv(num_rows, TILE_T)
    table_I2 = rows.slot_of_row_T.new_empty((tiles, 2))
    _table(
        (tiles, 1, 1), (rows.slot_of_row_T, layout.offset_S, layout.rank_S, table_I2),
        (num_rows,), (TILE_T, WINDOW), 4,
    )  # fmt: skip
    return Window(table_I2, window_room(adapters))


def place_factors(factors: Factors, a_RD: Tensor, b_RO: Tensor, adapters: Adapters) -> None:
    """Copies the factors to where products read them: once after each of their changes."""
    layout, (num_out, width) = layout_of(adapters, a_RD.device), factors.weight_OD.shape
    blocks = cdiv(width, _BLOCK_N) + cdiv(num_out, _BLOCK_N)
    bad_SB = factors.bad_S.new_empty((len(adapters.slot_ranks), blocks))
    _place(
        (blocks, len(adapters.slot_ranks), 1),
        (
            a_RD, b_RO, factors.a_PD, factors.bt_OD, bad_SB, layout.offset_S, layout.rank_S,
        ),
        (
            width, num_out, layout.total_rank, cdiv(width, _BLOCK_N), blocks, a_RD.stride(0),
            b_RO.stride(0), factors.a_PD.stride(0), factors.bt_OD.stride(0),
        ),
        (layout.num_members, layout.rank_pad, _BLOCK_N),
        4,
    )  # fmt: skip
    torch.amax(bad_SB, 1, out=factors.bad_S)


def window_shrink(
    x_TD: Tensor, factor_RD: Tensor, bad_S: Tensor, to_TD: Tensor, rows: RowTensors,
    window: Window, layout: Layout, tuning: Tuning, is_dy: bool = False,
) -> Tensor:  # fmt: skip
    """h_TJ, compact; and in its windows. factor_RD: the factor's rows of the first member; is_dy:
    the members' are the same rows, of their own columns of x, too."""
    num_rows, width = x_TD.shape
    h_TJ = empty((num_rows, layout.j_width), x_TD.dtype, x_TD.device)
    _shrink(
        (cdiv(num_rows, tuning.shrink_t), layout.num_members, 1),
        (
            x_TD, factor_RD, h_TJ, to_TD, bad_S, rows.slot_of_row_T, rows.slot_bounds_S3,
            layout.offset_S, layout.rank_S, rows.scale_S, window.table_I2, layout.edges,
        ),
        (
            num_rows, width, layout.total_rank, x_TD.stride(0), factor_RD.stride(0),
            layout.j_width, to_TD.stride(0), window.room,
        ),
        (
            layout.num_members, is_dy, layout.rank_pad, tuning.shrink_t, tuning.shrink_k, TILE_T,
            WINDOW,
        ),
        tuning.warps, tuning.shrink_stages,
    )  # fmt: skip
    return h_TJ


def window_linear(
    x: Operand, weight: Operand, out_TN: Tensor, window: Window, layout: Layout, weight_nk: bool,
    stages: int = 4, is_urgent: bool = False,
) -> None:  # fmt: skip
    """out_TN: what is filled. weight_nk: the weight is [features of the result, summed ones].
    is_urgent: see `ProductLaunch`."""
    (num_rows, num_in), num_out = x.own.shape, out_TN.shape[1]
    tiles = cdiv(num_rows, TILE_T) * cdiv(num_out, _TILE_N)
    programs = cdiv(tiles, cdiv(tiles, num_sms()))  # the fewest that take no more waves of tiles
    members = layout.num_members
    constants = (
        weight_nk, members if weight_nk else 1, 1 if weight_nk else members, TILE_T, _TILE_N,
        WINDOW, _GROUP_T, programs, next_power_of_2(cdiv(tiles, programs)), stages,
    )  # fmt: skip
    out_tiles = TensorDescriptor.from_tensor(out_TN, [TILE_T, _TILE_N // 2])
    numbers = num_rows, num_out, num_in, layout.total_rank, window.room
    tensors = window.table_I2, layout.edges
    _linear(
        ProductLaunch(
            None, programs, (x, weight), out_tiles, tensors, numbers, constants, is_urgent
        )
    )


_compiled: dict[Any, Any] = {}


def _linear(launch: ProductLaunch) -> None:
    """As `Launcher`, which knows no descriptors of three dimensions."""
    urgent = beside_current().fork() if launch.is_urgent else None
    with torch.cuda.stream(urgent) if urgent else contextlib.nullcontext():
        compiled = _run(launch)
    tape = launching._recorded.tape
    if isinstance(tape, WindowTape) and compiled is not None:
        tape.add_windowed(launch._replace(compiled=compiled))
    elif tape is not None:
        tape.is_whole = False


def _run(launch: ProductLaunch) -> Any:
    """What was launched; None where it was Triton that did it."""
    operands = [operand.descriptor() for operand in launch.operands]
    tiles = [*(descriptor for _, descriptor in operands), launch.out_tiles]
    numbers = (*launch.numbers, *(first for first, _ in operands))
    device = driver.active.get_current_device() if not INTERPRETED else None
    key = device, launch.out_tiles.base.dtype, launch.numbers, launch.constants
    found = _compiled.get(key)
    addresses = [tensor.data_ptr() for tensor in launch.tensors]
    if found is None or launching._is_hooked() or any(address & 15 for address in addresses):
        kernel: Any = window_linear_kernel
        found = kernel[(launch.programs, 1, 1)](
            *tiles, *launch.tensors, *numbers, *launch.constants, num_warps=8,
            num_stages=launch.constants[-1],
        )  # fmt: skip
        # Of a real device: elsewhere nothing is launched, only compiled.
        if launching._KNOWN_TRITON and isinstance(device, int) and not launching._is_hooked():
            _compiled[key] = found
        return None
    found.run(
        launch.programs, 1, 1, driver.active.get_current_stream(device), found.function,
        found.packed_metadata, None, None, None, *tiles, *addresses, *numbers, *launch.constants,
    )  # fmt: skip
    return found


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()

"""Block sizes by shape. Static shapes get the same blocks, hence the same bits, every time.

Chosen from experiments/kernel_ratio/tune.py on one H100.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


_SHARED_BYTES = 200_000  # what one program may take of an SM's shared memory
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tuning(NamedTuple):
    """Of the small kernels. `*_splits` cut a reduction where too few programs would run."""

    shrink_t: int = 64
    shrink_k: int = 128
    shrink_splits: int = 1
    shrink_stages: int = 4
    expand_t: int = 32
    expand_n: int = 256
    db_t: int = 64
    db_n: int = 128
    db_splits: int = 1
    db_stages: int = 4
    db_warps: int = 4
    sum_t: int = 4
    da_t: int = 64
    da_n: int = 128
    da_splits: int = 1
    da_stages: int = 4
    da_warps: int = 4
    warps: int = 4
    fused: bool = True
    fused_backward: bool = True
    own_shrink: bool = False  # of the operator under autograd: the forward makes its own h


class GemmBlocks(NamedTuple):
    t: int
    n: int
    k: int
    warps: int
    stages: int
    halves: bool
    efficiency: float


# Efficiency: relative speed of a full tile; smaller tiles reread more, larger ones fill fewer SMs.
_GEMM_BLOCKS = (
    GemmBlocks(128, 256, 64, 8, 3, True, 1.0),
    GemmBlocks(128, 128, 64, 4, 4, False, 0.87),
    GemmBlocks(64, 128, 64, 4, 4, False, 0.7),
)


# Between so many rows the library's product, which adds to an expansion that is there, gives the
# input gradient sooner than the fused one, because many tiles hold two slots. Its bits may depend
# on the number of rows, though, so not where they must not.
_LIBRARY_BACKWARD_ROWS = range(3072, 8192)
LEAST_BLOCK_T = min(blocks.t for blocks in _GEMM_BLOCKS)


_spared = 0
_told: int | None = None


@functools.lru_cache(maxsize=1)
def num_sms() -> int:
    """That products count on."""
    if INTERPRETED:
        return 4
    count = _told or torch.cuda.get_device_properties(0).multi_processor_count
    return count - _spared


def spare_sms(count: int) -> None:
    """From now on products leave ``count`` multiprocessors to others, as to NCCL. One program of a
    product runs on each that it counts on: one that finds it taken starts when another is through,
    and the product takes twice as long. What was captured before is as it was."""
    global _spared
    _spared = count
    _forget()


@contextlib.contextmanager
def counting_on(count: int) -> Iterator[None]:
    """Within, as on a GPU with so many multiprocessors, whatever is here."""
    global _told
    before, _told = _told, count
    _forget()
    try:
        yield
    finally:
        _told = before
        _forget()


def _forget() -> None:
    num_sms.cache_clear()
    tuning_of.cache_clear()


def gemm_blocks(num_rows: int, widths: tuple[int, ...]) -> GemmBlocks | None:
    """The blocks that finish first; None where the members' edges fit no block."""

    def cost(blocks: GemmBlocks) -> float:
        tiles = cdiv(num_rows, blocks.t) * cdiv(sum(widths), blocks.n)
        waves = float(cdiv(tiles, num_sms()))
        if has_half_tail(blocks, num_rows, sum(widths)):
            waves -= 1 - _HALF_TILE_COST
        return waves * blocks.t * blocks.n / blocks.efficiency

    fitting = [b for b in _GEMM_BLOCKS if len(widths) == 1 or all(w % b.n == 0 for w in widths)]
    return min(fitting, key=cost) if fitting else None


# A 128 x 128 tile over a 128 x 256 one: half the work, at the smaller tile's efficiency.
_HALF_TILE_COST = 0.5 / 0.87


def has_half_tail(blocks: GemmBlocks, num_rows: int, num_out: int) -> bool:
    """Whether the last wave of tiles is at most half full, so that halves of them fit one wave."""
    tiles = cdiv(num_rows, blocks.t) * cdiv(num_out, blocks.n)
    rest = tiles % num_sms()
    return blocks.halves and tiles > num_sms() and 0 < 2 * rest <= num_sms()


@functools.lru_cache(maxsize=1024)
def tuning_of(
    num_rows: int, width: int, widths: tuple[int, ...], num_slots: int, rank_pad: int,
    itemsize: int, deterministic: bool,
) -> Tuning:  # fmt: skip
    """widths: of the members' outputs. itemsize: of x, in bytes."""
    j_width = len(widths) * rank_pad
    shrunk = shrunk_members(len(widths), rank_pad) * rank_pad
    shrink_t = 64 if shrunk <= 64 else 16
    shrink_k = _fit(128, lambda k: k * (shrink_t * itemsize + shrunk * 4) * 3)
    j_block = next_power_of_2(j_width)
    expand_n = _fit(256, lambda n: j_block * (n * 4 + 32 * itemsize), _SHARED_BYTES)
    # Wide blocks leave fewer parts of dh, narrow ones more programs.
    db_n = 256 if num_rows >= 8192 and num_slots <= 8 else 128
    db_n = min(db_n, max(32, 8192 // rank_pad), next_power_of_2(max(32, *widths)))
    db_t = _fit(64, lambda t: t * (db_n + rank_pad) * itemsize * 3)
    # Few slots: narrow column blocks fill the SMs without cutting the sum over rows.
    da_n = 32 if deterministic or j_width > 64 else 128
    if da_n == 128 and cdiv(width, da_n) * num_slots < 96:
        da_n = 64
    da_t = _fit(8192 // da_n, lambda t: t * (da_n + j_width) * itemsize * 3)
    db_programs = cdiv(max(widths), db_n) * len(widths) * num_slots
    da_programs = cdiv(width, da_n) * num_slots
    rows_of_slot = num_rows // num_slots
    return Tuning(
        expand_n=expand_n, shrink_t=shrink_t, shrink_k=shrink_k,
        db_t=db_t, db_n=db_n, da_t=da_t, da_n=da_n,
        shrink_splits=_shrink_splits(cdiv(num_rows, shrink_t), width // shrink_k),
        db_splits=1 if deterministic else _row_splits(db_programs, 2 * num_sms(), rows_of_slot),
        da_splits=1 if deterministic or da_programs >= 96 else _row_splits(
            da_programs, 2 * num_sms(), rows_of_slot
        ),
        db_warps=8 if db_n > 128 else 4, db_stages=3, sum_t=2 if num_rows < 4096 else 4,
        da_stages=3 if da_n == 128 else 4,
        fused_backward=deterministic or num_rows not in _LIBRARY_BACKWARD_ROWS,
    )  # fmt: skip


def shrunk_members(num_members: int, rank_pad: int) -> int:
    """Members whose factors one launch of the shrink reads: all of them from one read of x, or
    one where all together would leave room for tiles of few rows and features only."""
    return num_members if num_members * rank_pad <= 64 else 1


def _fit(block: int, shared_bytes: Callable[[int], int], limit_bytes: int = 100_000) -> int:
    while block > 16 and shared_bytes(block) > limit_bytes:
        block //= 2
    return block


# The product adds up the parts of h. Its loads of eight, issued ahead, do not fit an SM's shared
# memory beside four stages of 128 x 128 tiles (258,048 bytes of 232,448).
_MOST_SHRINK_SPLITS = 4


def _shrink_splits(tiles: int, steps: int) -> int:
    splits, most = 1, 2 * num_sms()
    while splits < _MOST_SHRINK_SPLITS and 2 * splits * tiles <= most and steps >= 8 * splits:
        splits *= 2
    return splits


def _row_splits(programs: int, wanted: int, rows_of_slot: int) -> int:
    """Parts that a slot's rows are cut into. One in deterministic mode: a slot's sum must not
    depend on how many slots there are."""
    return max(1, min(8, wanted // programs, rows_of_slot // 256))

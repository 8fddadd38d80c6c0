"""Times of the captured step's operations (``muxtune.cost.captured`` names them).

Every operation is called as the program calls it, on a few random blocks of the model's own sizes
in turn, so that its weights come from memory and not out of a cache. On CUDA a pass over the
blocks is captured as a graph and replayed between events, which leaves launches out, as in the
step; on a CPU the calls are timed as they are. Points are kept as they are measured, so that a
budget that ends early leaves a profile with fewer points.

Shape suffixes as in ``muxtune.runtime.static_step``.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from muxtune.cost.attention import SEQUENCES, sequence_counts
from muxtune.cost.fused_sites import MIN_RANK, extra_size, fused_sites, padded_rank, slot_elements
from muxtune.cost.memory import STATIC_LOSS_ROWS
from muxtune.cost.shapes import ModelShape
from muxtune.profiling.bench import summarise
from muxtune.profiling.step_cases import TARGETS
from muxtune.runtime.random_models import random_model
from muxtune.runtime.static_step import (
    Sequence as Rows,
)
from muxtune.runtime.static_step import (
    SlotInput,
    StaticModel,
    StepLayout,
    StepProgram,
    program,
)
from muxtune.runtime.static_step.attention import (
    Packing,
    Rotary,
    attention_backward,
    attention_forward,
)
from muxtune.runtime.static_step.inputs import HostBuffer, StepInputs
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.types import AdapterSlot
from muxtune.workload.synthetic import histogram
from muxtune_kernels import AdamWSlots, multi_task_adamw_
from muxtune_kernels.block import (
    add_rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward_,
)
from muxtune_kernels.cross_entropy import multi_task_cross_entropy_grad
from muxtune_kernels.multi_lora import (
    LoraLinear,
    ReadyFlags,
    StepRows,
    lora_linear_factor_grad,
    lora_linear_forward,
    lora_linear_input_grad,
    tuning,
)

# Of a 7B's so many leave any cache, and are so large that they are drawn on the GPU.
NUM_BLOCKS = 4
MAX_POSITIONS = 4096
MAX_SEQLEN = 1024
MIN_SEQLEN = 512  # what a runner's buffer is made for at least; it decides on the attention's form
_REPEATS = 5
# Of repeats over their median, beyond which something else was in the way: of 15 of 1,800 points of
# a quiet device, one of which took nine times as long as with more rows.
_WIDE, _MOST_SERIES = 0.08, 3
_SAMPLE_S = 4e-3  # of one replay; shorter work is repeated inside the graph
# Products draw so much power that a device lowers its clock; a step is nearly all products. For a
# while the clock is what it was for the operation before: of few rows, too, and of an attention.
_HEATED_FROM = {
    "frozen": 512, "full_loss": 512, "site_forward": 1024, "site_backward": 1024, "mixed": 1024,
    "part": 1024, "attention": 1024,
}  # fmt: skip
_HEAT_S, _MOST_HEATS = 0.03, 24
LARGE_VOCABULARY = 4  # times the model's; of Llama 3 over Llama 2
_UNEVEN_ROWS = 21  # no slot begins where a tile does
Work = Callable[[], Any]
BlockWork = Callable[[int], Any]  # of a block, by its place


class Point(NamedTuple):
    """``sizes``: by axis, in the order of the op's axes."""

    name: str
    sizes: dict[str, float]
    seconds: list[float]


class CapturedOps:
    """Measures points on ``num_blocks`` random blocks of ``shape`` and keeps them."""

    def __init__(
        self,
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        deterministic: bool = True,
        num_blocks: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        compiles_only: bool = False,
        model: StaticModel | None = None,
    ) -> None:
        """``compiles_only``: everything runs once and is not timed. ``model``: of so many blocks,
        instead of a random one."""
        self.shape, self.device, self.deterministic = shape, device, deterministic
        self._compiles_only = compiles_only
        small = shape._replace(
            num_layers=num_blocks or (NUM_BLOCKS if device.type == "cuda" else 2)
        )
        self.model = _random_blocks(small, device, dtype) if model is None else model
        self.small, self._clock = small, clock
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.points: list[Point] = []

    # -- what is measured

    @torch.no_grad()
    def rows(self, num_rows: int) -> None:
        """Operations without adapters."""
        self.products(num_rows)
        with self._clean():
            self._elementwise(num_rows)

    @torch.no_grad()
    def products(self, num_rows: int) -> None:
        """The fused linears without adapters, and the logits with their loss."""
        with self._clean():
            for number, site in enumerate(fused_sites(self.shape)):
                weights = [block.linears[number].weight_OD for block in self.model.blocks]
                biases = [block.linears[number].bias_O for block in self.model.blocks]
                x_TD, dy_TO = (self._fresh(num_rows, n) for n in weights[0].shape[::-1])
                self._add(
                    f"frozen_forward.{site.size}", {"rows": num_rows},
                    lambda i, x=x_TD, w=weights, b=biases: functional.linear(x, w[i], b[i]),
                )  # fmt: skip
                self._add(
                    f"frozen_backward.{site.size}", {"rows": num_rows},
                    lambda i, dy=dy_TO, w=weights: dy @ w[i],
                )  # fmt: skip
            self._loss(num_rows)

    @torch.no_grad()
    def sites(self, num_slots: int, rank: int, num_rows: int) -> None:
        """The fused linears with LoRA in every slot, rows spread evenly."""
        sizes = {"slots": num_slots, "rank": padded_rank([rank]), "rows": num_rows}
        self._all_sites("site", sizes, (rank,) * num_slots, num_rows)

    @torch.no_grad()
    def mixed_sites(self, num_slots: int, rank: int, num_rows: int) -> None:
        """The same with the least rank in every other slot."""
        sizes = {"slots": num_slots, "rank": padded_rank([rank]), "rows": num_rows}
        ranks = [rank if slot % 2 else MIN_RANK for slot in range(num_slots)]
        self._all_sites("mixed", sizes, ranks, num_rows)

    @torch.no_grad()
    def part_sites(self, num_slots: int, rank: int, num_rows: int) -> None:
        """The same where half of the rows are filler, which is of no slot."""
        sizes = {"slots": num_slots, "rank": padded_rank([rank]), "rows": num_rows}
        self._all_sites("part", sizes, (rank,) * num_slots, num_rows, num_rows // 2)

    def _all_sites(
        self,
        kind: str,
        sizes: dict[str, float],
        ranks: Sequence[int],
        num_rows: int,
        used_rows: int = 0,
    ) -> None:
        with self._clean():
            slots = tuple(AdapterSlot("lora", rank, TARGETS["lora"]) for rank in ranks)
            pool, inputs, _ = self._loaded(slots, num_rows, used_rows=used_rows)
            for number, site in enumerate(fused_sites(self.shape)):
                loras = [layer[number].lora for layer in pool.adapters.layers]
                rows = inputs.step_rows(num_rows)
                self._site(kind, site.size, sizes, loras, rows, num_rows)

    def _site(
        self,
        kind: str,
        size: str,
        sizes: dict[str, float],
        loras: Sequence[LoraLinear],
        rows: Any,
        count: int,
    ) -> None:
        outputs, inputs = loras[0].weight_OD.shape
        x_TD, dy_TO = self._fresh(count, inputs), self._fresh(count, outputs)
        rows, cleared = self._with_flags(rows, count)

        def forward(i: int) -> Any:
            return cleared(i, lambda: lora_linear_forward(x_TD, loras[i], rows))

        def backward(i: int) -> Any:
            return cleared(i, lambda: lora_linear_input_grad(dy_TO, x_TD, saved[i], loras[i], rows))

        saved = [forward(index)[1] for index in range(len(loras))]
        carried = [backward(index)[1] for index in range(len(loras))]
        self._add(f"{kind}_forward.{size}", sizes, forward)
        self._add(f"{kind}_backward.{size}", sizes, backward)
        self._add(
            f"{kind}_factor.{size}", sizes,
            lambda i: lora_linear_factor_grad(carried[i], x_TD, loras[i], rows),
        )  # fmt: skip

    def _with_flags(self, rows: StepRows, count: int) -> tuple[StepRows, Callable[..., Any]]:
        """Rows as the step program has them, and who calls a block's work: where products make
        their own low-rank h, they count in flags, which are cleared once a pass."""
        if not program.OWN_SHRINK or not self.model.embedding_VD.is_cuda:
            return rows, lambda _, work: work()
        tiles = count // program._LEAST_TILE_ROWS + 1
        flags = ReadyFlags(len(self.model.blocks) * tiles, self.device)

        def cleared(index: int, work: Work) -> Any:
            if index == 0:
                flags.clear()
            return work()

        return rows._replace(flags=flags), cleared

    @torch.no_grad()
    def attention(self, num_rows: int, mix: str, seed: int = 0) -> None:
        """All rows in sequences of a mix; see ``mixed_lengths``."""
        with self._clean():
            slots = (AdapterSlot("lora", 8, ("q_proj",)),)
            lengths = mixed_lengths(mix, num_rows, seed)
            _, inputs, pairs = self._loaded(slots, num_rows, lengths)
            heads, model = self.model.heads, self.model
            fields = inputs.fields
            rotary = Rotary(model.cos_LP, model.sin_LP, fields["positions"][:num_rows])
            packing = Packing(fields["cu_seqlens"], fields["tiles"], inputs.layout.max_seqlen)
            qkv = [self._fresh(num_rows, heads.qkv_features) for _ in model.blocks]
            dout_TC = self._fresh(num_rows, heads.num_heads * heads.head_dim)
            results = [attention_forward(item, rotary, heads, packing) for item in qkv]
            sizes = {"rows": num_rows, "pairs": pairs, **sequence_counts(lengths)}
            shape = f"{heads.num_heads}x{heads.num_kv_heads}x{heads.head_dim}"
            self._add(
                f"attention_forward.{shape}", sizes,
                lambda i: attention_forward(qkv[i], rotary, heads, packing),
            )  # fmt: skip
            self._add(
                f"attention_backward.{shape}", sizes,
                lambda i: attention_backward(
                    dout_TC, qkv[i], results[i][0], results[i][1], rotary, heads, packing
                ),
            )  # fmt: skip

    @torch.no_grad()
    def optimizer(self, num_slots: int, rank: int) -> None:
        with self._clean():
            slots = (AdapterSlot("lora", rank, TARGETS["lora"]),) * num_slots
            pool, inputs, _ = self._loaded(slots, 16 * num_slots)
            elements = sum(slot_elements(self.small, slot) for slot in slots)
            pools = pool.adapters.optimizer_pools
            settings = AdamWSlots(
                *inputs.fields["settings"],
                step_S=pool.adapters.settings.step_S,
                active_S=inputs.fields["active"],
            )
            for name, active in (("adamw_active", True), ("adamw_idle", False)):
                inputs.fields["active"].fill_(active)
                self._add(
                    name, {"elements": elements},
                    lambda _: multi_task_adamw_(pools, settings, zero_grads=False), blocks=1,
                )  # fmt: skip

    @torch.no_grad()
    def extra(
        self, method: str, num_slots: int, rank: int, num_rows: int, used_rows: int = 0
    ) -> None:
        """What slots of another method add to one block; of prefixes, the attention with them, over
        that without. ``used_rows``: where not all rows are of these slots."""
        with self._clean():
            slot = AdapterSlot(method, rank, TARGETS[method])
            pool, inputs, _ = self._loaded((slot,) * num_slots, num_rows, used_rows=used_rows)
            kind = "half" if used_rows else "extra"
            sizes = {"size": extra_size(self.shape, (slot,), method), "rows": float(num_rows)}
            works = self._extra_works(pool, inputs, num_rows)
            for side, (with_it, without) in zip(("forward", "backward"), works, strict=True):
                seconds = self._time(with_it, len(self.model.blocks))
                if without is not None:
                    middle = float(np.median(self._time(without, len(self.model.blocks))))
                    seconds = [max(0.01 * item, item - middle) for item in seconds]
                self.points.append(
                    Point(f"{kind}_{method}_{side}.{self.shape.hidden}", sizes, seconds)
                )

    def _extra_works(
        self, pool: StaticPool, inputs: StepInputs, num_rows: int
    ) -> tuple[tuple[BlockWork, BlockWork | None], ...]:
        """Forward and backward: a block with them, and without where they are not by themselves."""
        assert pool.extras is not None
        rows, layers = inputs.step_rows(num_rows), pool.extras.layers
        if pool.extras.prefixes:
            with_extras, plain = (
                StepProgram(
                    self.model, pool.adapters, inputs, deterministic=self.deterministic,
                    overlap=False, extras=extras,
                )
                for extras in (pool.extras, None)
            )  # fmt: skip
            return self._prefix_works(with_extras, plain, rows, num_rows)
        widths = [linear.weight_OD.shape for linear in self.model.blocks[0].linears]
        xs = [self._fresh(num_rows, inputs_) for _, inputs_ in widths]
        ys = [self._fresh(num_rows, outputs) for outputs, _ in widths]

        def forward(i: int) -> Any:
            return [
                (site.before(x, rows)[1], site.after(y, rows)[1])
                for site, x, y in zip(layers[i], xs, ys, strict=True)
            ]

        saved = [forward(i) for i in range(len(layers))]

        def backward(i: int) -> Any:
            return [
                (site.after_backward(y, _unread(around), rows, self.deterministic),
                 site.before_backward(x, scaled, rows))
                for site, x, y, (scaled, around) in zip(layers[i], xs, ys, saved[i], strict=True)
            ]  # fmt: skip

        return (forward, None), (backward, None)

    def _prefix_works(
        self, with_prefixes: StepProgram, plain: StepProgram, rows: Any, num_rows: int
    ) -> Any:
        features = self.model.heads.qkv_features
        qkv_TC = self._fresh(num_rows, features)
        dout_TC = self._fresh(num_rows, self.shape.query_dim)

        for which in (with_prefixes, plain):
            which._lay_out(num_rows, rows)

        class Kept(NamedTuple):
            qkv_TC: Tensor
            attended_TC: Tensor
            attention: Any

        def forward(which: StepProgram) -> BlockWork:
            return lambda i: which._attend(i, qkv_TC.clone())

        def backward(which: StepProgram) -> BlockWork:
            rotated_TC = qkv_TC.clone()
            kept = Kept(rotated_TC, *which._attend(0, rotated_TC))
            return lambda i: which._attend_backward(i, dout_TC, kept, rows)

        return (
            (forward(with_prefixes), forward(plain)),
            (backward(with_prefixes), backward(plain)),
        )

    def _elementwise(self, num_rows: int) -> None:
        hidden, inner, model = self.shape.hidden, self.shape.intermediate, self.model
        weight_D, eps = model.final_norm_D, model.eps
        count = len(model.blocks)
        xs = [self._fresh(num_rows, hidden) for _ in range(2 * count)]
        rstd_T = add_rms_norm(xs[0], xs[1], weight_D, eps)[2]
        gates = [self._fresh(num_rows, 2 * inner) for _ in range(count)]
        dacts = [self._fresh(num_rows, inner) for _ in range(count)]
        ids_T = torch.randint(self.shape.vocab, (num_rows,), device=self.device)
        sizes = {"rows": num_rows}
        self._add(
            f"add_norm_forward.{hidden}", sizes,
            lambda i: add_rms_norm(xs[2 * i], xs[2 * i + 1], weight_D, eps),
        )  # fmt: skip
        self._add(
            f"add_norm_backward.{hidden}", sizes,
            lambda i: rms_norm_backward(xs[2 * i], xs[2 * i + 1], weight_D, rstd_T, xs[0]),
        )  # fmt: skip
        self._add(f"swiglu_forward.{inner}", sizes, lambda i: swiglu(gates[i]))
        self._add(f"swiglu_backward.{inner}", sizes, lambda i: swiglu_backward_(dacts[i], gates[i]))
        self._add(f"embedding.{hidden}", sizes, lambda _: model.embedding_VD.index_select(0, ids_T))

    @torch.no_grad()
    def large_loss(self, num_rows: int) -> None:
        """The logits with their loss of a vocabulary ``LARGE_VOCABULARY`` times as large: logits
        that no cache holds take longer than their number says."""
        with self._clean():
            vocabulary = LARGE_VOCABULARY * self.shape.vocab
            self._loss(num_rows, self._fresh(vocabulary, self.shape.hidden))

    def _loss(self, num_rows: int, head_VD: Tensor | None = None) -> None:
        head_VD = self.model.lm_head_VD if head_VD is None else head_VD
        normed_TD = self._fresh(num_rows, self.shape.hidden)
        labels_T = torch.randint(len(head_VD), (num_rows,), device=self.device)
        slot_T = torch.zeros(num_rows, dtype=torch.int32, device=self.device)
        scale_S = torch.ones(1, device=self.device)
        self._add(
            f"full_loss.{self.shape.hidden}x{len(head_VD)}", {"rows": num_rows},
            lambda _: multi_task_cross_entropy_grad(
                normed_TD, head_VD, labels_T, slot_T, scale_S, 1,
                min(STATIC_LOSS_ROWS, num_rows), whole_chunks=True,
            ),
            blocks=1,
        )  # fmt: skip

    # -- how

    def _loaded(
        self,
        slots: tuple[AdapterSlot, ...],
        num_rows: int,
        lengths: Sequence[int] = (),
        used_rows: int = 0,
    ) -> tuple[StaticPool, StepInputs, float]:
        """Pools and inputs of a micro-batch, and its query-key pairs. ``lengths``: of the one
        slot's sequences; without them ``used_rows`` (0: all) are spread nearly evenly over the
        slots, in sequences of one tile of the attention."""
        pool = StaticPool(self.model, slots, self.deterministic)
        of_slot = [lengths] if lengths else uneven_lengths(used_rows or num_rows, len(slots))
        count, most = sum(map(len, of_slot)), max(MIN_SEQLEN, *map(max, of_slot))
        filler = num_rows // MIN_SEQLEN + len(slots) + 64
        layout = StepLayout(num_rows, len(slots), count + filler, most)
        inputs = StepInputs(layout, self.device)
        self._fill(pool, inputs, of_slot)
        pairs = sum(n * (n + 1) / 2 for items in of_slot for n in items)
        return pool, inputs, pairs

    def _fill(self, pool: StaticPool, inputs: StepInputs, of_slot: Sequence[Sequence[int]]) -> None:
        """A task in every slot, with random tokens in sequences of these lengths."""
        if pool.extras is not None:
            for slot in range(len(of_slot)):
                rows_of = {key: views[0].shape[0] for key, views in pool.extras.views(slot)}
                pool.extras.take(slot, rows_of)
        host = HostBuffer(inputs.layout, False)
        random = np.random.default_rng(0)
        sequences = [
            Rows(slot, random.integers(1, self.shape.vocab, n), np.ones(n, bool), position)
            for slot, items in enumerate(of_slot)
            for position, n in enumerate(items)
        ]
        slots = {i: SlotInput(sum(items)) for i, items in enumerate(of_slot)}
        host.fill(inputs.layout.max_rows, sequences, slots)
        inputs.buffer.copy_(host.buffer)
        inputs.spans = host.spans

    def _fresh(self, rows: int, features: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(rows + features)
        return torch.randn(
            (rows, features), device=self.device, dtype=self.model.dtype, generator=generator
        )

    def _add(self, name: str, sizes: dict[str, float], work: BlockWork, blocks: int = 0) -> None:
        seconds = self._time(work, blocks or len(self.model.blocks), heating_s(name, sizes))
        self.points.append(Point(name, {k: float(v) for k, v in sizes.items()}, seconds))

    def _time(self, work: BlockWork, blocks: int, heat_s: float = 0.0) -> list[float]:
        """Seconds of one call, of each of a few repeats, after as many seconds of the same."""

        def once(times: int) -> None:
            for _ in range(times):
                for index in range(blocks):
                    work(index)

        if self._compiles_only:
            once(1)
            return [1.0]
        if self.device.type != "cuda":
            once(1)
            return [self._host_s(lambda: once(1)) / blocks for _ in range(_REPEATS)]
        return self._replayed(once, blocks, heat_s)

    def _host_s(self, work: Work) -> float:
        start_s = self._clock()
        work()
        return self._clock() - start_s

    def _replayed(
        self, once: Callable[[int], None], blocks: int, heat_s: float = 0.0
    ) -> list[float]:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            once(1)
            rough_s = min(_event_s(lambda: once(1)) for _ in range(2))
            times = int(min(20, max(1, _SAMPLE_S / max(rough_s, 1e-6))))
            # Without what torch.cuda.graph does around it: collecting garbage takes longer.
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            graph.capture_begin()
            try:
                once(times)
            finally:
                graph.capture_end()
            first_s = _event_s(graph.replay)
            for _ in range(min(_MOST_HEATS, int(heat_s / max(first_s, 1e-6)))):
                graph.replay()
            seconds = steadiest(
                lambda: [_event_s(graph.replay) / (times * blocks) for _ in range(_REPEATS)]
            )
        return seconds

    @contextlib.contextmanager
    def _clean(self) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            if self.device.type == "cuda":
                gc.collect(1)  # of this point: what the imports left is older
                torch.cuda.synchronize()
                torch.cuda.empty_cache()

    def ops(self) -> dict[str, dict[str, Any]]:
        """The profile's ``ops``. Only full grids are kept of an operation with several sizes."""
        found: dict[str, dict[str, Any]] = {}
        for point in self.points:
            axes = [axis for axis in point.sizes if axis not in SEQUENCES]
            op = found.setdefault(point.name, {"unit": "s", "axes": axes, "points": []})
            op["points"].append({**point.sizes, **summarise(point.seconds)})
        for name, op in found.items():
            if not name.startswith("attention"):
                op["points"] = full_grid(op["axes"], op["points"])
        return dict(sorted(found.items()))


def steadiest(measure: Callable[[], list[float]]) -> list[float]:
    """Repeats; measured again where they lie far apart, and then the series that does so least."""
    series = [measure()]
    while _apart(series[-1]) > _WIDE and len(series) < _MOST_SERIES:
        series.append(measure())
    return min(series, key=_apart)


def _apart(seconds: Sequence[float]) -> float:
    return (max(seconds) - min(seconds)) / sorted(seconds)[len(seconds) // 2]


def heating_s(name: str, sizes: Mapping[str, float]) -> float:
    """For how many seconds an operation runs before it is timed."""
    heated = (name.startswith(kind) and sizes["rows"] >= n for kind, n in _HEATED_FROM.items())
    return _HEAT_S if any(heated) else 0.0


def _random_blocks(small: ModelShape, device: torch.device, dtype: torch.dtype) -> StaticModel:
    model, _ = random_model(small, 0, device, dtype)
    model.to(device=device, dtype=dtype).requires_grad_(False)
    return StaticModel.of(model, MAX_POSITIONS)


def mixed_lengths(mix: str, num_rows: int, seed: int = 0) -> list[int]:
    """Sequences that fill the rows, drawn in turn from the histograms that ``mix`` names (by
    ``+``), none longer than the longest for which the packed form of attention is meant."""
    random = np.random.default_rng([seed, num_rows])
    tables = [histogram(name) for name in mix.split("+")]
    lengths: list[int] = []
    while sum(lengths) < num_rows:
        for table in tables:
            shares = table.counts / table.counts.sum()
            drawn = int(random.choice(table.lengths_tokens, p=shares))
            lengths.append(min(drawn, MAX_SEQLEN, num_rows))
    return _cut(lengths, num_rows)


def uneven_lengths(num_rows: int, num_slots: int) -> list[list[int]]:
    """Sequences of one tile of the attention for each slot, which have some rows more and some
    less in turn: where a slot of a real micro-batch begins, no tile of a product does."""
    share = num_rows // num_slots
    off = min(_UNEVEN_ROWS, share // 4)
    pairs = num_slots // 2 * 2
    shares = [share + (off if i % 2 else -off) * (i < pairs) for i in range(num_slots)]
    return [_cut([64] * rows, rows) for rows in shares]


def _cut(lengths: Sequence[int], num_rows: int) -> list[int]:
    """As many as fill the rows, the last one cut."""
    found: list[int] = []
    for length in lengths:
        left = num_rows - sum(found)
        if left <= 0:
            break
        found.append(min(length, left))
    return found


def _unread(saved: Any) -> Any:
    """What a forward has kept for its backward, which takes entries off the lists in it."""
    if isinstance(saved, list):
        return [_unread(item) for item in saved]
    return tuple(_unread(item) for item in saved) if type(saved) is tuple else saved


def full_grid(axes: Sequence[str], points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points whose last size was measured with every combination of the other sizes; the
    last of equal ones. A budget that ended early leaves others."""
    latest = {tuple(point[axis] for axis in axes): point for point in points}
    others = {key[:-1] for key in latest}
    by_last: dict[float, set[tuple[float, ...]]] = {}
    for key in latest:
        by_last.setdefault(key[-1], set()).add(key[:-1])
    most = max(len(keys) for keys in by_last.values())
    if most < len(others):  # no size has them all: keep the combinations of the fullest ones
        others = set.intersection(*(keys for keys in by_last.values() if len(keys) == most))
    kept = [
        point for key, point in latest.items() if key[:-1] in others and by_last[key[-1]] >= others
    ]
    return sorted(kept, key=lambda point: [point[axis] for axis in axes])


def tiling_here() -> dict[str, Any]:
    """The tiles that the kernels choose from on this GPU, as ``muxtune.cost.tiles`` reads them."""
    return {
        "num_multiprocessors": tuning.num_sms(),
        "half_cost": tuning._HALF_TILE_COST,
        "tiles": [[b.t, b.n, b.efficiency, b.halves] for b in tuning._GEMM_BLOCKS],
    }


def _event_s(work: Work) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3

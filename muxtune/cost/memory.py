"""Memory of an instance by item, as pure arithmetic.

What the torch runtime keeps for the backward of one block of a frozen backbone, in numbers per
token row (D model width, Q queries, K keys, F MLP width, r rank):

- each of the two norms: its input (the residual stream, D) and one scalar;
- attention: q, k, v as rotated (Q + 2K), its output (Q), one log-sum-exp per head;
- activation: gated keeps gate, silu(gate) and up (3F), plain keeps its input and output (2F);
- a linear keeps NO input, because its weight is frozen, UNLESS an adapter sits on it: then its
  input (once for all linears that read the same tensor: the normed hidden state D for q/k/v and
  for gate/up, Q for the output projection, F for down) and the adapter's own numbers (r for LoRA);
- a prompt's virtual tokens are rows of the pass; rows that attend to virtual tokens keep their
  keys and values twice and the attention's output before it is merged;
- dropout in a slot adds a mask (one byte a number) and the dropped input, per adapted linear.

The captured step of a GPU (on Llama-like blocks, one GPU;
``MemoryOptions.static_step``)
keeps what its backward reads and nothing else: the residual stream before each norm and the norms'
outputs (4 D), q, k and v in one (Q + 2K), attention's output (Q), gate and up and their product
(3F), one log-sum-exp per head, and r numbers for each adapted linear. The linears that read the
same input are one there: a task that adapts one of them has room in all. Logits exist for
``loss_rows_max`` rows at a time, gradients go straight to where they accumulate, and the peak is
in the MLP's backward: the gradients of its activations (3F) and of the residual stream, its norm
and what the second stream still reads (4 D). Recomputed blocks, the first ones, keep their input.

In the eager pass, a pass stages its adapter gradients apart while the activations are let go, so
that the larger of the two counts. Recomputed blocks keep their input only (D). On top of it come
the gradients that flow through one block, and the logits of the rows with a loss, their softmax
and their gradient (3 V, fp32; on the CPU two of them, of few rows of one task at a time).

On the CPU the C library keeps holes between the buffers of a pass: the process holds 1.4 times what
a pass uses (1.35 to 1.45 measured with glibc 2.36, 256 to 1,900 rows of SmolLM2-135M).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from muxtune.cost import ops
from muxtune.cost.shapes import Linear, ModelShape
from muxtune.types import (
    AdapterSlot,
    Estimate,
    MemoryLedger,
    Plan,
    ReplicaShape,
    ShapeKey,
    StageLedgers,
)

MIB = 1 << 20
STATIC_LOSS_ROWS = 1024
CPU_LOSS_ROWS = 256  # as muxtune_kernels.cross_entropy computes them there
CPU_HOLES = 1.4
_STATIC_METHODS = ("lora", "dora", "ia3", "bottleneck", "prefix", "prompt")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SOLO = ReplicaShape()


class MemoryOptions(NamedTuple):
    """``gradient_bytes``: one accumulated gradient of a trained number (8 on the CPU, whose sums
    are float64); the number itself and its two moments are fp32.
    ``loss_rows_max``: rows whose logits exist at once, each of ``logit_bytes``; 0: all rows of
    the pass.
    ``activation_factor``: what an eager framework, or the host's allocator, keeps over this
    module's count.
    ``static_step``: whether passes run as captured steps where these know the method.
    ``pass_factor``, ``fixed_bytes``: what was measured over this module's count of a pass
    (``muxtune.cost.calibration``).
    ``relative_error``: half-width of the interval; 0.15 is a judgement until it is measured."""

    dtype_bytes: int = 2
    gradient_bytes: int = 4
    loss_rows_max: int = 0
    logit_bytes: int = 12
    framework_bytes: int = 1024 * MIB
    activation_factor: float = 1.0
    static_step: bool = False
    pass_factor: float = 1.0
    fixed_bytes: int = 0
    relative_error: float = 0.15

    @property
    def trained_bytes(self) -> int:
        """Bytes of one trained number: weight, gradient, two moments."""
        return 12 + self.gradient_bytes


def memory_options(model: ModelShape, kind: str, *, eager: bool = False) -> MemoryOptions:
    """Defaults by kind of device: the CPU runtime computes in fp32 and its interpreter with torch
    and transformers takes about 600 MiB; a CUDA context with cuBLAS workspaces about 1 GiB.

    ``eager``: HF PEFT's norms and adapters keep fp32 copies; its measured 9.2 MB a row of a
    Llama-2-7B (51.8 - 33.0 GB over 2,048 rows) are 1.65 times this module's count.
    """
    factor = 1.65 if eager else 1.0
    if kind == "cpu":
        # Already fp32: no copies to keep.
        return MemoryOptions(
            dtype_bytes=4,
            gradient_bytes=8,
            loss_rows_max=CPU_LOSS_ROWS,
            logit_bytes=8,
            framework_bytes=600 * MIB,
            activation_factor=CPU_HOLES,
        )
    if eager:
        return MemoryOptions(dtype_bytes=model.weight_bytes, activation_factor=factor)
    # The captured step's loss turns its logits into their gradient where they lie.
    return MemoryOptions(
        dtype_bytes=model.weight_bytes,
        static_step=True,
        loss_rows_max=STATIC_LOSS_ROWS,
        logit_bytes=model.weight_bytes,
    )


@lru_cache(maxsize=256)
def stage_layers(model: ModelShape, pp: int) -> tuple[int, ...]:
    """Layers on each stage, so that the busiest has the least to do: the last one also computes
    the loss head, which is worth as many layers as their weights go into its own. The others are
    even, and the first stages take what is left over."""
    if pp == 1:
        return (model.num_layers,)
    weights = sum(item.in_features * item.out_features for item in model.block_linears)
    head_layers = model.vocab * model.hidden / weights
    others = pp - 1

    def busiest(last: int) -> tuple[float, int]:
        return max(-(-(model.num_layers - last) // others), last + head_layers), -last

    last = min(range(1, model.num_layers - others + 1), key=busiest)
    share, extra = divmod(model.num_layers - last, others)
    return (*(share + (stage < extra) for stage in range(others)), last)


class MemoryModel:
    """Bytes that plans, tasks and passes take. All answers are per GPU."""

    def __init__(self, model: ModelShape, options: MemoryOptions) -> None:
        self.model, self.options = model, options
        self._tasks: dict[tuple[AdapterSlot, ReplicaShape], int] = {}
        self._passes: dict[tuple[ShapeKey, ReplicaShape, int], tuple[int, int]] = {}
        self._weights: dict[ReplicaShape, tuple[int, ...]] = {}
        self._saved: dict[tuple[tuple[AdapterSlot, ...], int], float] = {}
        self._static_ranks: dict[AdapterSlot, int] = {}

    def backbone_bytes(self, replica: ReplicaShape = _SOLO, stage: int = 0) -> int:
        """Weights of one stage's shard: its blocks, embedding first, head last."""
        if replica not in self._weights:
            ops.check_replica(self.model, replica)
            self._weights[replica] = tuple(
                self._stage_weights(replica, index) for index in range(replica.pp)
            )
        return self._weights[replica][stage]

    def _stage_weights(self, replica: ReplicaShape, stage: int) -> int:
        model = self.model
        layers = stage_layers(model, replica.pp)[stage]
        linears = sum(item.num_parameters for item in model.block_linears) / replica.tp
        count = layers * (linears + 2 * model.norm_parameters)
        # Every rank of a stage holds the embedding and the head whole, as the runtime does.
        if stage == 0:
            count += model.embedding_parameters
        if stage == replica.pp - 1:
            # A tied head needs its own copy when it lies on another stage than the embedding.
            separate = model.vocab * model.hidden if replica.pp > 1 else model.head_parameters
            count += separate + model.norm_parameters
        return int(count * self.options.dtype_bytes)

    def task_bytes(self, slot: AdapterSlot, replica: ReplicaShape = _SOLO, stage: int = 0) -> int:
        """Adapter weights, gradients and optimizer state of one task on one stage."""
        key = (slot, replica)
        if key not in self._tasks:
            held = widened(slot) if self._is_static((slot,), replica) else slot
            numbers = sum(ops.adapter_tensors(self.model, held, replica.tp))
            self._tasks[key] = numbers * self.options.trained_bytes
        layers = self.model.num_layers
        if replica.pp > 1:
            layers = stage_layers(self.model, replica.pp)[stage]
        edge = sum(ops.edge_tensors(self.model, slot)) if stage == 0 else 0
        return self._tasks[key] * layers + edge * self.options.trained_bytes

    def resident_bytes(self, slots: Sequence[AdapterSlot], replica: ReplicaShape = _SOLO) -> int:
        """Backbone, adapters with their optimizer state, and framework on the fullest stage."""
        return self.options.framework_bytes + max(
            self.backbone_bytes(replica, stage)
            + sum(self.task_bytes(slot, replica, stage) for slot in slots)
            for stage in range(replica.pp)
        )

    def pass_bytes(self, shape: ShapeKey, replica: ReplicaShape = _SOLO, stage: int = 0) -> int:
        """Activations and loss workspace of one pass in flight on one stage."""
        activations, loss = self.pass_parts_bytes(shape, replica, stage)
        return activations + loss

    def pass_parts_bytes(
        self, shape: ShapeKey, replica: ReplicaShape, stage: int
    ) -> tuple[int, int]:
        """(activations, loss workspace) of one pass."""
        key = (shape, replica, stage)
        parts = self._passes.get(key)
        if parts is None:
            if len(self._passes) > 65536:
                self._passes.clear()
            activations, loss = self._pass_parts(shape, replica, stage)
            factor, fixed = self.options.pass_factor, self.options.fixed_bytes
            parts = int(activations * factor) + fixed, int(loss * factor)
            self._passes[key] = parts
        return parts

    def _is_static(self, slots: Sequence[AdapterSlot], replica: ReplicaShape) -> bool:
        """Whether the captured step computes these slots, whose memory is counted apart."""
        is_known = self.model.gated_mlp and self.model.rotary and replica == _SOLO
        return self.options.static_step and is_known and all(map(_has_static_form, slots))

    def _static_parts(self, shape: ShapeKey) -> tuple[int, int]:
        """(activations, loss workspace) of one captured step; see the module's text."""
        model, rows = self.model, shape.padded_tokens + ops.prompt_rows(shape.slots)
        kept = 4 * model.hidden + 2 * model.query_dim + 2 * model.kv_dim + 3 * model.intermediate
        kinds = Counter(shape.slots)
        ranks = sum(count * self._static_rank(slot) for slot, count in kinds.items())
        copies = self._static_copies(kinds)
        kept += ranks / max(1, len(shape.slots)) + 2 * (model.num_heads + 2) + sum(copies)
        # Gradients are copied where values were.
        working = 3 * model.intermediate + 4 * model.hidden + max(copies, default=0)
        if any(slot.dropout for slot in kinds):
            working += model.intermediate  # the adapters' share of an input gradient, apart
        recomputed = min(shape.recompute, model.num_layers)
        if recomputed:
            working += kept  # of the block that is computed again
        stored = (model.num_layers - recomputed) * kept + recomputed * model.hidden
        stored_bytes = int(rows * stored * self.options.dtype_bytes)
        working_bytes = int(rows * working * self.options.dtype_bytes)
        loss_bytes = (
            self.options.logit_bytes * min(rows, self.options.loss_rows_max or rows) * model.vocab
        )
        # The logits are gone when the backward begins: only what they need beyond it counts.
        return stored_bytes + working_bytes, max(0, loss_bytes - working_bytes)

    def _static_rank(self, slot: AdapterSlot) -> int:
        """Numbers a row of one block that the slot's adapters keep."""
        if slot not in self._static_ranks:
            linears = ops.target_linears(self.model, widened(slot))
            self._static_ranks[slot] = 0 if slot.method == "ia3" else slot.rank * len(linears)
        return self._static_ranks[slot]

    def _static_copies(self, slots: Iterable[AdapterSlot]) -> list[int]:
        """Widths of what one block keeps whole for methods other than LoRA, whoever's the rows
        are: what fused linears give before IA3, each bottleneck and each magnitude, and what a
        linear of its own reads before IA3."""
        found: dict[tuple[str, str, str], int] = {}
        for slot in slots:
            if slot.method == "lora":
                continue
            for linear in ops.target_linears(self.model, slot):
                group = self._group_of(linear.name)
                width = sum(item.out_features for item in group)
                names = ",".join(item.name for item in group)
                # IA3's members share one copy; the others change it one after another.
                member = "" if slot.method == "ia3" else linear.name
                found[slot.method, names, member] = width
                if slot.method == "ia3" and len(group) == 1:
                    found["ia3 in", names, ""] = linear.in_features
        return list(found.values())

    def _group_of(self, linear_name: str) -> list[Linear]:
        """The linears that are one in the captured step."""
        leaf = linear_name.rsplit(".", 1)[-1]
        leaves = next((members for members in _FUSED if leaf in members), (leaf,))
        linears = self.model.block_linears
        return [item for item in linears if item.name.rsplit(".", 1)[-1] in leaves]

    def _pass_parts(self, shape: ShapeKey, replica: ReplicaShape, stage: int) -> tuple[int, int]:
        if self._is_static(shape.slots, replica):
            return self._static_parts(shape)
        model, rows = self.model, shape.padded_tokens + ops.prompt_rows(shape.slots)
        layers = stage_layers(model, replica.pp)[stage]
        recomputed = min(layers, -(-shape.recompute * layers // model.num_layers))
        kept = self.saved_numbers_per_row(shape.slots, replica.tp)
        stored = (layers - recomputed) * kept + recomputed * model.hidden
        # One block's own numbers live on while its gradients are computed.
        working = 2 * max(model.intermediate // replica.tp, model.hidden) + 2 * model.hidden
        if recomputed:
            working += kept
        numbers = rows * (stored + working + model.hidden) * self.options.activation_factor
        activations = max(
            numbers * self.options.dtype_bytes, self._staged_bytes(shape, replica, stage)
        )
        loss_rows = min(rows, self.options.loss_rows_max or rows)
        last = stage == replica.pp - 1
        loss = int(self.options.logit_bytes * loss_rows * model.vocab)
        return int(activations), loss if last else 0

    def _staged_bytes(self, shape: ShapeKey, replica: ReplicaShape, stage: int) -> int:
        """The adapters' gradients of one pass, before they are added to the accumulated ones."""
        trained = sum(self.task_bytes(slot, replica, stage) for slot in shape.slots)
        return trained * self.options.gradient_bytes // self.options.trained_bytes

    def saved_numbers_per_row(self, slots: tuple[AdapterSlot, ...], tp: int = 1) -> float:
        """Numbers per token row that one block keeps for its backward (see the module's text).

        Rows are taken as spread evenly over the slots for the adapters' own numbers; an input is
        kept whole as soon as one slot's adapter reads it, since views share the storage.
        """
        key = (slots, tp)
        if key not in self._saved:
            if len(self._saved) >= 65536:
                self._saved.clear()
            self._saved[key] = self._saved_numbers(slots, tp)
        return self._saved[key]

    def _saved_numbers(self, slots: tuple[AdapterSlot, ...], tp: int) -> float:
        model = self.model
        queries, keys = model.query_dim / tp, model.kv_dim / tp
        inner = model.intermediate / tp
        numbers = 2 * (model.hidden + 1)
        numbers += 2 * queries + 2 * keys + model.num_heads / tp
        numbers += (3 if model.gated_mlp else 2) * inner
        inputs: dict[str, float] = {}
        for slot, count in Counter(slots).items():
            method = ops.adapter_method(slot)
            if ops.is_prepended(slot):
                # Keys and values once more, behind the virtual tokens'; the merged output.
                numbers += (2 * keys + queries) * count / len(slots)
            for linear in ops.target_linears(model, slot):
                shard = linear.sharded(tp)
                inputs[_input_of(linear.name)] = shard.in_features
                own: float = method.saved_numbers(shard, slot.rank)
                if slot.dropout:
                    # A mask of one byte, and the autograd form's dropped input.
                    behind = slot.method == "bottleneck"
                    width = shard.out_features if behind else shard.in_features
                    own += width * (1 + 1 / self.options.dtype_bytes)
                    # DoRA keeps what the second frozen product gives.
                    own += shard.out_features if slot.method == "dora" else 0
                numbers += own * count / len(slots)
        return numbers + sum(inputs.values())

    def ledgers(self, plan: Plan, *, extrapolated: bool = True) -> StageLedgers:
        """One ledger per stage of each different replica shape of the plan.

        hTasks of one instance take turns, so the largest pass counts, not their sum; stage s of
        S has up to S - s micro-batches in flight; tensor parallelism alone with an order two, one
        of which communicates.
        """
        ledgers = tuple(
            self._ledger(plan, replica, stage)
            for replica in dict.fromkeys(plan.replicas)
            for stage in range(replica.pp)
        )
        peak = float(max(ledger.total_bytes for ledger in ledgers))
        margin = peak * self.options.relative_error
        return StageLedgers(ledgers, Estimate(peak, peak - margin, peak + margin, extrapolated))

    def _ledger(self, plan: Plan, replica: ReplicaShape, stage: int) -> MemoryLedger:
        weights = self.backbone_bytes(replica, stage)
        # A pool has room for every slot of the shape, taken or not.
        trained = sum(
            self.task_bytes(slot, replica, stage)
            for htask in plan.htasks
            for slot in htask.shapes[-1].slots
        )
        passes = [
            self.pass_parts_bytes(shape, replica, stage)
            for htask in plan.htasks
            for shape in htask.shapes
        ]
        activations, loss = max(passes, key=sum, default=(0, 0))
        numbers = trained // self.options.trained_bytes
        overlaps = bool(plan.order) and replica.pp == 1
        items = {
            "backbone": weights,
            "adapter_weights": 4 * numbers,
            "adapter_gradients": self.options.gradient_bytes * numbers,
            "optimizer_state": 8 * numbers,
            "activations": activations * (replica.pp - stage + overlaps),
            "loss": loss,
            "framework": self.options.framework_bytes,
        }
        return MemoryLedger(stage, items)


def _has_static_form(slot: AdapterSlot) -> bool:
    return slot.method in _STATIC_METHODS and not (slot.method == "dora" and slot.dropout)


def widened(slot: AdapterSlot) -> AdapterSlot:
    """With the targets that the captured step has room for."""
    if slot.method not in ("lora", "dora"):
        return slot
    leaves = {target.rsplit(".", 1)[-1] for target in slot.targets}
    for members in _FUSED:
        if leaves & set(members):
            leaves |= set(members)
    return slot._replace(targets=tuple(sorted(leaves)))


def _input_of(linear_name: str) -> str:
    """Linears with the same answer read the same tensor."""
    leaf = linear_name.rsplit(".", 1)[-1]
    if leaf in {"q_proj", "k_proj", "v_proj"}:
        return "attention"
    return "mlp" if leaf in {"gate_proj", "up_proj"} else linear_name

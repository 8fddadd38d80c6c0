"""The operations of one pass of a frozen backbone, by name and size.

One list serves the analytic model (which needs floating-point operations and bytes) and the
profiled one (which needs names and sizes, because it looks measured times up). Notation in the
formulas: T token rows, D model width, Q width of the queries, K width of the keys, F width of the
MLP, V vocabulary, r adapter rank, b bytes per number.

The backbone is frozen: a linear's backward yields the input gradient only, as many operations as
its forward, and no weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from muxtune.cost.shapes import Linear, ModelShape
from muxtune.errors import ConfigError
from muxtune.types import AdapterSlot, ReplicaShape

BACKBONE = "backbone"
ATTENTION = "attention"
ELEMENTWISE = "elementwise"
ADAPTERS = "adapters"
LOSS = "loss"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
OVERHEAD = "overhead"
RECOMPUTE = "recompute"
CATEGORIES: tuple[str, ...] = (
    BACKBONE, ATTENTION, ELEMENTWISE, ADAPTERS, LOSS, OPTIMIZER, COMMUNICATION, OVERHEAD, RECOMPUTE,
)  # fmt: skip


class Op(NamedTuple):
    """``count`` executions of one operation.

    ``size``: where to look in a profile, one number per axis. ``flops`` and ``bytes`` are of ONE
    execution. ``rows``: rows of a matrix product (its efficiency depends on them), 0 for an
    operation without one. ``kernels``: launches of one execution when nothing is fused.
    """

    name: str
    category: str
    backward: bool
    count: int
    size: tuple[float, ...]
    flops: float
    bytes: float
    rows: float
    kernels: int


# ----------------------------------------------------------------------------------- backbone


def linear_ops(linear: Linear, rows: float, dtype_bytes: int, count: int = 1) -> tuple[Op, Op]:
    """Forward y = x W and input gradient dx = dy W^T of ``count`` equal frozen linears.

    Each: 2 T in out operations; bytes: b (in out + T in + T out).
    """
    in_features, out_features = linear.in_features, linear.out_features
    flops = 2.0 * rows * in_features * out_features
    moved = dtype_bytes * (in_features * out_features + rows * (in_features + out_features))
    shape = f"{in_features}x{out_features}"
    return (
        Op(f"linear_forward.{shape}", BACKBONE, False, count, (rows,), flops, moved, rows, 1),
        Op(f"linear_backward.{shape}", BACKBONE, True, count, (rows,), flops, moved, rows, 1),
    )


def _linears(model: ModelShape, rows: float, dtype_bytes: int, tp: int) -> list[Op]:
    # Linears of equal size are one op with a count: a profile measures each size once.
    sizes: dict[tuple[int, int], tuple[Linear, int]] = {}
    for linear in model.block_linears:
        shard = linear.sharded(tp)
        key = (shard.in_features, shard.out_features)
        sizes[key] = (shard, sizes[key][1] + 1 if key in sizes else 1)
    ops: list[Op] = []
    for shard, count in sizes.values():
        ops.extend(linear_ops(shard, rows, dtype_bytes, count))
    return ops


def gradient_sums(model: ModelShape) -> int:
    """Additions of width D in a block's backward where a tensor feeds several consumers: the
    queries, keys and values share an input (2, none where they are fused), gate and up share one
    (1, gated only), and each of the two residual branches joins its main path (2)."""
    shared_qkv = 0 if model.fused_qkv else 2
    return shared_qkv + (3 if model.gated_mlp else 2)


def _memory_bound(
    name: str, backward: bool, count: int, rows: float, numbers: float, kernels: int, b: int
) -> Op:
    # One operation a number is far below any device's ridge: bytes decide.
    return Op(name, ELEMENTWISE, backward, count, (rows,), numbers, numbers * b, 0.0, kernels)


def elementwise_ops(model: ModelShape, rows: float, dtype_bytes: int, tp: int) -> list[Op]:
    """Norms, rotary embedding, activation, residual additions of one block.

    Numbers moved, when each is one fused kernel. Norm (two): forward 2 T D, backward 3 T D.
    Rotary: 2 T (Q+K) each way. Activation: forward 3 T F gated (gate, up, product), 2 T F plain;
    backward 5 T F gated, 3 T F plain. Addition: 3 T D; two forward (residuals),
    ``gradient_sums`` backward.
    """
    hidden, inner = rows * model.hidden, rows * model.intermediate / tp
    queries, keys = model.query_dim // tp, model.kv_dim // tp
    kind, forward, backward = ("gated", 3, 5) if model.gated_mlp else ("plain", 2, 3)
    width = model.intermediate // tp
    ops = [
        _memory_bound(f"norm_forward.{model.hidden}", False, 2, rows, 2 * hidden, 8, dtype_bytes),
        _memory_bound(f"norm_backward.{model.hidden}", True, 2, rows, 3 * hidden, 14, dtype_bytes),
        _memory_bound(f"add.{model.hidden}", False, 2, rows, 3 * hidden, 1, dtype_bytes),
        _memory_bound(
            f"add.{model.hidden}", True, gradient_sums(model), rows, 3 * hidden, 1, dtype_bytes
        ),
        _memory_bound(
            f"{kind}_activation_forward.{width}", False, 1, rows, forward * inner, 2, dtype_bytes
        ),
        _memory_bound(
            f"{kind}_activation_backward.{width}", True, 1, rows, backward * inner, 3, dtype_bytes
        ),
    ]
    if model.rotary:
        moved, shape = 2 * rows * (queries + keys), f"{queries}x{keys}"
        ops += [
            _memory_bound(f"rotary_forward.{shape}", False, 1, rows, moved, 10, dtype_bytes),
            _memory_bound(f"rotary_backward.{shape}", True, 1, rows, moved, 12, dtype_bytes),
        ]
    return ops


def block_ops(model: ModelShape, rows: float, dtype_bytes: int, tp: int = 1) -> list[Op]:
    """All operations of one block on ``rows`` token rows of one rank, without attention
    (``attention_flops_per_pair``) and without adapters."""
    ops = _linears(model, rows, dtype_bytes, tp) + elementwise_ops(model, rows, dtype_bytes, tp)
    ops += [
        Op("layer_overhead_forward", OVERHEAD, False, 1, (), 0.0, 0.0, 0.0, 0),
        Op("layer_overhead_backward", OVERHEAD, True, 1, (), 0.0, 0.0, 0.0, 0),
    ]
    if tp > 1:
        # Megatron: one all-reduce after attention and one after the MLP, and the same backward.
        moved = rows * model.hidden * dtype_bytes
        for backward in (False, True):
            ops.append(
                Op(f"all_reduce.tp{tp}", COMMUNICATION, backward, 2, (moved,), 0.0, moved, 0.0, 1)
            )
    return ops


def edge_ops(model: ModelShape, rows: float, dtype_bytes: int, pp: int = 1) -> list[Op]:
    """Once a pass: embedding (2 T D numbers, 3 T D more with learned positions; no gradient: it is
    frozen and first), final norm, the pass's own overhead, and, between stages, one transfer each
    way."""
    hidden = rows * model.hidden
    embedding = (2 if model.rotary else 5) * hidden
    ops = [
        Op(
            f"embedding.{model.hidden}", BACKBONE, False, 1, (rows,),
            0.0, embedding * dtype_bytes, 0.0, 1,
        ),
        _memory_bound(f"norm_forward.{model.hidden}", False, 1, rows, 2 * hidden, 8, dtype_bytes),
        _memory_bound(f"norm_backward.{model.hidden}", True, 1, rows, 3 * hidden, 14, dtype_bytes),
        Op("pass_overhead", OVERHEAD, False, 1, (), 0.0, 0.0, 0.0, 0),
    ]  # fmt: skip
    if pp > 1:
        moved = hidden * dtype_bytes
        for backward in (False, True):
            ops.append(Op("p2p", COMMUNICATION, backward, 1, (moved,), 0.0, moved, 0.0, 1))
    return ops


# ---------------------------------------------------------------------------------- attention


class AttentionWork(NamedTuple):
    """Work of one layer's attention in one direction: per query-key pair and per token row."""

    name: str
    flops_per_pair: float
    bytes_per_row: float
    kernels: int


def attention_work(model: ModelShape, dtype_bytes: int, tp: int = 1) -> tuple[AttentionWork, ...]:
    """Forward and backward of the causal, block-diagonal attention of one layer.

    Forward: scores and weighted values, 2 Q operations a pair each, so 4 Q. Backward as flash
    attention does it: the scores again and four more products, 10 Q. Bytes per row: forward reads
    q, k, v and writes the output, b (2Q + 2K); backward reads q, k, v, output and its gradient and
    writes three gradients, b (4Q + 4K).
    """
    queries, keys = model.query_dim // tp, model.kv_dim // tp
    shape = f"{model.num_heads // tp}x{model.num_kv_heads // tp}x{model.head_dim}"
    return (
        AttentionWork(
            f"attention_forward.{shape}", 4.0 * queries, dtype_bytes * 2.0 * (queries + keys), 1
        ),
        AttentionWork(
            f"attention_backward.{shape}", 10.0 * queries, dtype_bytes * 4.0 * (queries + keys), 3
        ),
    )


# ----------------------------------------------------------------------------------- adapters


PREFIX, PROMPT = "prefix", "prompt"


class AdapterMethod(NamedTuple):
    """How a PEFT method costs on one linear (already sharded); nothing there for the two that put
    virtual tokens before the sequences (``is_prepended``).

    ``parameters(linear, rank)``: trained numbers, one entry per tensor.
    ``ops(linear, rank, rows, dtype_bytes)``: forward and backward of one layer's linear.
    ``saved_numbers(linear, rank)``: numbers per row kept for the backward, besides the input.
    """

    parameters: Callable[[Linear, int], tuple[int, ...]]
    ops: Callable[[Linear, int, float, int], tuple[Op, ...]]
    saved_numbers: Callable[[Linear, int], int]


def lora_parameters(linear: Linear, rank: int) -> tuple[int, ...]:
    """A: r in; B: r out."""
    return (rank * linear.in_features, rank * linear.out_features)


def lora_ops(linear: Linear, rank: int, rows: float, dtype_bytes: int) -> tuple[Op, ...]:
    """Low-rank y += (x A^T) B^T s on ``rows`` rows.

    Forward: shrink and expand, 2 T r (in + out) operations; reads x, reads and writes y.
    Backward: dh = dy B and dx += dh A (2 T r (in + out)), dA = dh^T x and dB = dy^T h
    (2 T r (in + out)); reads dy twice, x once, reads and writes dx. Weights r (in + out) each.
    """
    inputs, outputs = linear.in_features, linear.out_features
    work, weights = 2.0 * rows * rank * (inputs + outputs), rank * (inputs + outputs)
    forward_bytes = dtype_bytes * (rows * (inputs + 2 * outputs + 2 * rank) + weights)
    backward_bytes = dtype_bytes * (rows * (3 * inputs + 2 * outputs + 4 * rank) + 2 * weights)
    shape, size = f"{inputs}x{outputs}", (float(rank), rows)
    return (
        Op(
            f"adapter_lora_forward.{shape}", ADAPTERS, False, 1, size,
            work, forward_bytes, rows, 6,
        ),
        Op(
            f"adapter_lora_backward.{shape}", ADAPTERS, True, 1, size,
            2 * work, backward_bytes, rows, 10,
        ),
    )  # fmt: skip


def _row_scale_ops(linear: Linear, rows: float, dtype_bytes: int, width: int) -> tuple[Op, ...]:
    """Rows times a trained vector of ``width``: T W operations forward, 3 T W backward (input
    gradient, vector gradient); reads and writes T W forward, reads 2 T W and writes T W backward.

    Profiles do not measure it: there it is looked up as the linear's LoRA of rank 1, which reads
    and writes at least as much.
    """
    shape, size, numbers = f"{linear.in_features}x{linear.out_features}", (1.0, rows), rows * width
    moved = dtype_bytes * numbers
    return (
        Op(f"adapter_lora_forward.{shape}", ADAPTERS, False, 1, size, numbers, 2 * moved, 0.0, 3),
        Op(
            f"adapter_lora_backward.{shape}", ADAPTERS, True, 1, size,
            3 * numbers, 3 * moved, 0.0, 4,
        ),
    )  # fmt: skip


def ia3_parameters(linear: Linear, rank: int) -> tuple[int, ...]:
    """One vector over the outputs, or over the inputs at a feed-forward target: the larger is
    taken, because a slot does not know the task's options."""
    return (max(linear.in_features, linear.out_features),)


def ia3_ops(linear: Linear, rank: int, rows: float, dtype_bytes: int) -> tuple[Op, ...]:
    """y *= l, or x *= l, see ``_row_scale_ops``; the wider of the two."""
    return _row_scale_ops(linear, rows, dtype_bytes, ia3_parameters(linear, rank)[0])


def dora_parameters(linear: Linear, rank: int) -> tuple[int, ...]:
    """LoRA's, and the magnitude: out."""
    return (*lora_parameters(linear, rank), linear.out_features)


def dora_ops(linear: Linear, rank: int, rows: float, dtype_bytes: int) -> tuple[Op, ...]:
    """LoRA, the outputs times m / norm, and once a pass the norm |W + s B A|: the product of A
    with W, 2 r in out operations on r rows (the rest of the norm is smaller by in / r)."""
    norm = linear_ops(linear, float(rank), dtype_bytes)[0]._replace(category=ADAPTERS, kernels=12)
    scale = _row_scale_ops(linear, rows, dtype_bytes, linear.out_features)
    return (*lora_ops(linear, rank, rows, dtype_bytes), *scale, norm)


def bottleneck_parameters(linear: Linear, rank: int) -> tuple[int, ...]:
    """Down and up: r out each; their biases: r and out."""
    return (rank * linear.out_features, rank, rank * linear.out_features, linear.out_features)


def bottleneck_ops(linear: Linear, rank: int, rows: float, dtype_bytes: int) -> tuple[Op, ...]:
    """y += relu(y D + d) U + u: LoRA's operations with the outputs in the place of the inputs,
    so 4 T r out forward and twice that backward. Looked up as the linear's LoRA of this rank."""
    shape = f"{linear.in_features}x{linear.out_features}"
    square = linear._replace(in_features=linear.out_features)
    forward, backward = lora_ops(square, rank, rows, dtype_bytes)
    return (
        forward._replace(name=f"adapter_lora_forward.{shape}", kernels=8),
        backward._replace(name=f"adapter_lora_backward.{shape}", kernels=14),
    )


def is_prepended(slot: AdapterSlot) -> bool:
    """Whether the slot's tokens attend to ``rank`` virtual tokens before them."""
    return slot.method in (PREFIX, PROMPT)


def prompt_rows(slots: Sequence[AdapterSlot]) -> int:
    """Rows that a pass computes beside its chunks: each prompt's virtual tokens, once."""
    return sum(slot.rank for slot in slots if slot.method == PROMPT)


def prepended_pairs(slots: Sequence[AdapterSlot], rows: float) -> float:
    """Query-key pairs of a pass of ``rows`` rows besides those inside its sequences: every row of
    a slot with every virtual token of it (rows spread evenly over the slots), and the prompts' own
    causal attention."""
    virtual = sum(slot.rank for slot in slots if is_prepended(slot))
    own = sum(slot.rank * (slot.rank + 1) / 2 for slot in slots if slot.method == PROMPT)
    return virtual * rows / max(1, len(slots)) + own


def target_linears(model: ModelShape, slot: AdapterSlot) -> tuple[Linear, ...]:
    return () if is_prepended(slot) else model.target_linears(slot.targets)


_NOWHERE = AdapterMethod(
    lambda linear, rank: (), lambda linear, rank, rows, dtype_bytes: (), lambda linear, rank: 0
)
_LORA = AdapterMethod(lora_parameters, lora_ops, lambda _linear, rank: rank)
# rsLoRA differs from LoRA in a constant factor only.
ADAPTER_METHODS: dict[str, AdapterMethod] = {
    "lora": _LORA,
    "rslora": _LORA,
    "ia3": AdapterMethod(ia3_parameters, ia3_ops, lambda linear, rank: linear.out_features),
    "dora": AdapterMethod(
        dora_parameters, dora_ops, lambda linear, rank: rank + linear.out_features
    ),
    "bottleneck": AdapterMethod(
        bottleneck_parameters, bottleneck_ops, lambda linear, rank: rank + linear.out_features
    ),
    PREFIX: _NOWHERE,
    PROMPT: _NOWHERE,
}


def adapter_method(slot: AdapterSlot) -> AdapterMethod:
    """The cost table entry of the slot's method. Raises ConfigError for an unknown method and for
    a rank below 1."""
    if slot.method not in ADAPTER_METHODS:
        known = ", ".join(sorted(ADAPTER_METHODS))
        raise ConfigError(
            "adapter.method", f"no cost is known for '{slot.method}'", f"choose one of: {known}"
        )
    if slot.rank < 1:
        raise ConfigError("adapter.rank", f"is {slot.rank}", "give at least 1")
    return ADAPTER_METHODS[slot.method]


def adapter_ops(
    model: ModelShape, slot: AdapterSlot, rows: float, dtype_bytes: int, tp: int = 1
) -> list[Op]:
    """One slot's adapter operations in one block."""
    method = adapter_method(slot)
    found: list[Op] = []
    if is_prepended(slot):
        # The outputs of the attention to the virtual tokens and to the own ones become one.
        moved = 3 * rows * model.hidden
        merge = _memory_bound(f"add.{model.hidden}", False, 1, rows, moved, 8, dtype_bytes)
        found.append(merge._replace(category=ADAPTERS))
    for linear in target_linears(model, slot):
        shard = linear.sharded(tp)
        found.extend(method.ops(shard, slot.rank, rows, dtype_bytes))
        if slot.dropout:
            width = shard.out_features if slot.method == "bottleneck" else shard.in_features
            found.extend(dropout_ops(width, rows, dtype_bytes))
        if slot.dropout and slot.method == "dora":
            # The frozen product once more, of the dropped input.
            again = linear_ops(shard, rows, dtype_bytes)
            found.extend(op._replace(category=ADAPTERS) for op in again)
    return found


def dropout_ops(in_features: int, rows: float, dtype_bytes: int) -> tuple[Op, Op]:
    """Dropping an adapter's input: forward makes the mask (a hash of each number's place, one
    byte each) and the kept input; backward the kept input again and the kept gradient."""
    numbers = rows * in_features
    forward, backward = numbers * (2 * dtype_bytes + 1), numbers * (4 * dtype_bytes + 2)
    return (
        Op(
            f"adapter_dropout_forward.{in_features}", ADAPTERS, False, 1, (rows,),
            10 * numbers, forward, 0.0, 3,
        ),
        Op(
            f"adapter_dropout_backward.{in_features}", ADAPTERS, True, 1, (rows,),
            4 * numbers, backward, 0.0, 4,
        ),
    )  # fmt: skip


def adapter_tensors(model: ModelShape, slot: AdapterSlot, tp: int = 1) -> list[int]:
    """Sizes of the trained tensors of one block: a prefix has keys and values of its virtual
    tokens, r K each."""
    method = adapter_method(slot)
    if slot.method == PREFIX:
        return [slot.rank * model.kv_dim // tp] * 2
    return [
        size
        for linear in target_linears(model, slot)
        for size in method.parameters(linear.sharded(tp), slot.rank)
    ]


def edge_tensors(model: ModelShape, slot: AdapterSlot) -> list[int]:
    """Sizes of the trained tensors that are in no block: a prompt's r D, on the first stage."""
    return [slot.rank * model.hidden] if slot.method == PROMPT else []


def adapter_parameters(model: ModelShape, slot: AdapterSlot) -> int:
    """Trained numbers of one adapter over all layers, unsharded."""
    blocks = model.num_layers * sum(adapter_tensors(model, slot))
    return blocks + sum(edge_tensors(model, slot))


# ----------------------------------------------------------------------------- loss, optimizer


def loss_ops(model: ModelShape, rows: float, dtype_bytes: int) -> tuple[Op, Op]:
    """Frozen head and cross-entropy on ``rows`` rows that carry a label; every tensor-parallel rank
    of the last stage computes them whole.

    Forward: logits, 2 T D V operations; writes and reads T V logits in fp32. Backward: the input
    gradient, 2 T D V; reads the logits and writes their gradient in fp32.
    """
    vocab = model.vocab
    flops = 2.0 * rows * model.hidden * vocab
    moved = dtype_bytes * model.hidden * (vocab + rows) + 3 * 4.0 * rows * vocab
    shape = f"{model.hidden}x{vocab}"
    return (
        Op(f"loss_forward.{shape}", LOSS, False, 1, (rows,), flops, moved, rows, 6),
        Op(f"loss_backward.{shape}", LOSS, True, 1, (rows,), flops, moved, rows, 4),
    )


def optimizer_ops(model: ModelShape, slot: AdapterSlot, layers: int, tp: int = 1) -> list[Op]:
    """AdamW with clipping on one slot's fp32 tensors over ``layers`` blocks.

    Per number: reads weight, gradient and two moments, writes weight and moments (28 bytes), and
    the norm reads the gradient once more (4): 32 bytes, about 14 operations.
    """
    sizes: dict[int, int] = {}
    for size in adapter_tensors(model, slot, tp):
        sizes[size] = sizes.get(size, 0) + layers
    for size in edge_tensors(model, slot):
        sizes[size] = sizes.get(size, 0) + 1
    return [
        Op("adamw", OPTIMIZER, False, count, (float(size),), 14.0 * size, 32.0 * size, 0.0, 12)
        for size, count in sizes.items()
    ]


def check_replica(model: ModelShape, replica: ReplicaShape) -> None:
    """Raises ConfigError when the model cannot be cut as ``replica`` says."""
    if replica.tp < 1 or replica.pp < 1:
        raise ConfigError("replica", f"tp={replica.tp}, pp={replica.pp}", "give at least 1 each")
    if replica.pp > model.num_layers:
        raise ConfigError(
            "replica.pp",
            f"{replica.pp} stages are more than the {model.num_layers} layers of {model.name}",
            "use fewer stages",
        )
    dimensions: Mapping[str, int] = {
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "intermediate": model.intermediate,
    }
    for name, size in dimensions.items():
        if size % replica.tp:
            raise ConfigError(
                "replica.tp",
                f"{replica.tp} does not divide {name}={size} of {model.name}",
                "choose a divisor of the heads and of the MLP width",
            )

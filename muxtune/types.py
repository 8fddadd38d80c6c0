"""Domain types of the scheduler core: frozen data, no behaviour beyond simple derivations.

Units: ``_ns`` integer nanoseconds since the start of the run, ``_s`` seconds, ``_bytes`` bytes,
``_tokens`` tokens. Everything here is plain data that ``muxtune.codec`` turns into JSON and back,
because decisions are journalled and replayed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

NS_PER_S = 1_000_000_000
NO_EPOCH = -1
ROUNDS_TO_JUDGE_BY = 5  # a PROGRESS beside other news tells of at least as many
# ``new_tuple(Kind, values)`` is ``Kind(*values)`` of a NamedTuple, all values given, without the
# handling of keywords and defaults: for the kinds that a fleet makes one or more of for every task.
new_tuple = tuple.__new__


# --------------------------------------------------------------------------------------- tasks


class AdapterSpec(NamedTuple):
    """What a tenant trains. ``targets`` are module name suffixes, as in PEFT's target_modules."""

    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    options: Mapping[str, object] = {}


class OptimizerSpec(NamedTuple):
    """AdamW of one task. ``max_grad_norm`` 0 means no clipping."""

    lr: float = 2e-4
    schedule: str = "constant"  # constant | linear | cosine, after the warm-up
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class DataSpec(NamedTuple):
    """Where a task's sequences come from: a file, or lengths drawn from a shipped histogram."""

    path: str = ""
    format: str = "auto"  # auto | text | prompt_completion | messages | plain
    max_length_tokens: int = 512
    validation_share: float = 0.1
    histogram: str = ""  # synthetic tasks: name of the data set in the histograms
    tokenizer: str = ""  # synthetic tasks: tokenizer column of the histograms


class TaskSpec(NamedTuple):
    """One tenant's fine-tuning request. No scheduling decision may change its loss, gradients,
    optimizer steps or sample order.

    One optimizer step consumes ``batch_size * accumulation`` sequences. Exactly one of
    ``num_steps`` and ``epochs`` is set.
    """

    task_id: str
    model: str
    tenant: str = "default"
    adapter: AdapterSpec = AdapterSpec()
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    batch_size: int = 8
    accumulation: int = 1
    num_steps: int | None = None
    epochs: float | None = None
    seed: int = 0
    arrival_ns: int = 0
    priority: int = 0  # larger is more urgent
    deadline_ns: int | None = None
    max_slowdown: float | None = None  # against the task's predicted solo speed; >= 1
    cancel_ns: int | None = None  # the tenant withdraws the task at this time

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulation


class LengthSummary(NamedTuple):
    """What a planner knows about a task's sequences: a summary and a hash, not the lengths."""

    num_sequences: int
    mean_tokens: float
    mean_target_tokens: float  # tokens that carry loss
    mean_square_tokens: float
    max_tokens: int
    quantiles_tokens: tuple[int, ...]  # evenly spaced from minimum to maximum, ends included
    content_hash: str


class TaskState(enum.StrEnum):
    ARRIVED = "arrived"  # known, being prepared
    QUEUED = "queued"  # ready, not placed
    PLACED = "placed"  # on an instance
    DONE = "done"
    FAILED = "failed"
    REFUSED = "refused"
    CANCELLED = "cancelled"


class Discipline(enum.StrEnum):
    """Who of the waiting tasks comes first; see ``muxtune.planning.disciplines``."""

    FIFO = "fifo"
    PRIORITY = "priority"
    SHORTEST_REMAINING = "shortest_remaining"
    EARLIEST_DEADLINE = "earliest_deadline"
    FAIR_SHARE = "fair_share"


class AdapterSlot(NamedTuple):
    """Capacity that one adapter occupies in a captured shape. ``dropout``: whether the adapter's
    input is dropped out, which costs time; the rate is the task's own."""

    method: str
    rank: int
    targets: tuple[str, ...]
    dropout: bool = False


class TaskView(NamedTuple):
    """A task as policies and planners see it; rebuilt only when it changes."""

    task_id: str
    tenant: str
    model: str
    slot: AdapterSlot
    sequences_per_step: int
    max_length_tokens: int
    lengths: LengthSummary
    num_steps: int
    steps_done: int  # as of the last event that told
    arrival_ns: int
    priority: int = 0
    deadline_ns: int | None = None
    max_slowdown: float | None = None
    placed_ns: int | None = None  # of a task with a max_slowdown: when it was first placed,
    steps_ns: int = 0  # and as of when steps_done is known


# ------------------------------------------------------------------------------------ estimates


class Estimate(NamedTuple):
    """A predicted value with a 90% interval; ``extrapolated`` outside of what was measured."""

    value: float
    low: float
    high: float
    extrapolated: bool = False


class Estimates(NamedTuple):
    """Batched ``Estimate``: four arrays of one length."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    extrapolated: np.ndarray  # bool

    def at(self, index: int) -> Estimate:
        return Estimate(
            float(self.value[index]),
            float(self.low[index]),
            float(self.high[index]),
            bool(self.extrapolated[index]),
        )


# ---------------------------------------------------------------------------------------- plans


class PackRule(enum.StrEnum):
    """How a task's sequences become chunks."""

    PAD = "pad"  # one sequence a row, zero-padded to the row; what padded batches do
    CHUNK = "chunk"  # sequences packed into equal chunks; long ones span consecutive chunks


class DispatchRule(enum.StrEnum):
    """How micro-batches reach the replicas of an instance."""

    SINGLE = "single"
    BALANCED = "balanced"


class ReplicaShape(NamedTuple):
    tp: int = 1
    pp: int = 1

    @property
    def num_gpus(self) -> int:
        return self.tp * self.pp


class ShapeKey(NamedTuple):
    """What a captured graph depends on; planner and runtime share it.

    A micro-batch of this shape computes ``num_chunks * chunk_tokens`` token rows.
    ``recompute``: number of transformer blocks whose activations are recomputed.
    """

    chunk_tokens: int
    num_chunks: int
    slots: tuple[AdapterSlot, ...]
    recompute: int = 0

    @property
    def padded_tokens(self) -> int:
        return self.chunk_tokens * self.num_chunks


class HTask(NamedTuple):
    """Tasks batched spatially. ``quota``: chunks of each task per micro-batch.

    ``shapes`` are sorted by size; StepBuilder takes the first that holds the micro-batch. One
    shape makes the pass static. All shapes of an hTask have the same ``slots``.
    """

    shapes: tuple[ShapeKey, ...]
    slot_of: Mapping[str, int]
    quota: Mapping[str, int]
    packing: PackRule = PackRule.CHUNK


class HTaskTurn(NamedTuple):
    """``count`` micro-batches of an hTask; None: until each of its tasks closes one step."""

    htask: int
    count: int | None


class RankStream(NamedTuple):
    replica: int
    stage: int
    tp_rank: int
    stream: str  # compute | comm


class SubgraphRef(NamedTuple):
    """One subgraph of one turn's micro-batch; names no task, so an order is shared by reference."""

    turn: int
    occurrence: int
    subgraph: int
    round_offset: int


class Prediction(NamedTuple):
    """What the planner expects of a plan; the engine compares it with Progress."""

    round_time_s: Estimate
    round_effective_tokens: float
    round_padded_tokens: float
    peak_memory_bytes: Estimate
    step_time_s: Mapping[str, float]  # seconds between a task's optimizer steps
    solo_step_time_s: Mapping[str, float]  # the same task alone on this instance
    breakdown_s: Mapping[str, float]  # where a round's time goes
    tasks_step_time_s: float  # time in which every task takes one optimizer step
    takeover_s: float = 0.0  # until the plan's own rounds begin, told where promises hang on it
    played_ratio: float = 1.0  # of a pipeline without an order: played round over the closed form
    # Of a plan that keeps running hTasks: what better plans had gained up to ``kept_ns``, when
    # it was made, and what the better one would gain a second from then on.
    forgone_s: float = 0.0
    forgone_share: float = 0.0
    kept_ns: int = 0


class Plan(NamedTuple):
    """The decision as data, valid for many rounds; replaces the older epoch at a round boundary.

    ``interleaves``: what a pipeline without an order does: different hTasks' micro-batches enter
    as soon as they may, or each turn drains before the next begins.
    """

    instance_id: str
    epoch: int
    drains: frozenset[str]
    replicas: tuple[ReplicaShape, ...]
    htasks: tuple[HTask, ...]
    round: tuple[HTaskTurn, ...]
    dispatch: DispatchRule
    predicted: Prediction
    order: Mapping[RankStream, tuple[SubgraphRef, ...]] = {}
    reason: str = ""  # one line for people: why this plan
    interleaves: bool = True

    @property
    def task_ids(self) -> tuple[str, ...]:
        return tuple(task_id for htask in self.htasks for task_id in htask.quota)


class Refusal(NamedTuple):
    """The planner's answer when nothing fits; never another epoch. The engine also records with it
    that a task has to wait, and until when: ``predicted_start_ns``, None where nobody can tell."""

    reason: str
    task_ids: tuple[str, ...]
    needed_bytes: int = 0
    available_bytes: int = 0
    predicted_slowdown: float = 0.0
    remedy: str = ""
    needed_s: float = 0.0  # a step as it would be, and as it may be at most
    available_s: float = 0.0
    predicted_start_ns: int | None = None


class Corrections(NamedTuple):
    """What pressure and drift taught, quantised to whole percent so that memo keys stay few."""

    time_percent: int = 100
    memory_percent: int = 100


# -------------------------------------------------------------------------------- steps, packing


class Sample(NamedTuple):
    """One sequence of a batch: its index in the data set, and its lengths."""

    index: int
    tokens: int
    target_tokens: int


class Cursor(NamedTuple):
    """Where a task stands: optimizer steps done, and the positions in the current step's batch
    that are not yet computed; ``left`` is None at a step boundary."""

    step: int = 0
    left: tuple[int, ...] | None = None


class SequenceSlice(NamedTuple):
    """Tokens [start, stop) of the sequence at ``position`` in the step's batch. Pieces of one
    sequence lie in consecutive chunks of one micro-batch, in causal order."""

    position: int
    start: int
    stop: int


class Chunk(NamedTuple):
    task_id: str
    slot: int
    pieces: tuple[SequenceSlice, ...]


class MicroBatch(NamedTuple):
    """One pass of an hTask.

    ``loss_tokens``: target tokens of the task's WHOLE optimizer batch, the loss divisor.
    ``steps``: the optimizer step that each task's chunks belong to. ``packing``: the hTask's
    rule; under PAD each chunk is a padded row, computed as one causal sequence.
    """

    htask: int
    replica: int
    shape: ShapeKey
    chunks: tuple[Chunk, ...]
    loss_tokens: Mapping[str, int]
    closes_step: frozenset[str]
    steps: Mapping[str, int]
    packing: PackRule = PackRule.CHUNK


class PassLayout(NamedTuple):
    """What rows a packed micro-batch really has. ``slot_rows``: rows in use of every slot, in the
    slots' order; the rest is filler. ``sequence_rows``: of its sequences, without filler, as they
    lie."""

    slot_rows: tuple[int, ...]
    sequence_rows: tuple[int, ...]


class PassLoad(NamedTuple):
    """What a pass's time depends on. ``attention_pairs``: query-key pairs of the causal,
    block-diagonal attention, sum over sequences of n(n+1)/2. ``loss_rows``: rows with a loss.
    ``layout``: where one certain micro-batch is meant, whose time may be told more exactly than the
    affine form of its sums does; None: any with these sums."""

    shape: ShapeKey
    attention_pairs: float
    loss_rows: float
    optimizer_slots: tuple[int, ...] = ()  # slots that close a step in this pass
    layout: PassLayout | None = None


class PassCoefficients(NamedTuple):
    """Seconds of a pass: ``base_s + attention_pairs * per_pair_s + loss_rows * per_loss_row_s``
    plus ``optimizer_s[slot]`` for each slot that closes a step."""

    base_s: float
    per_pair_s: float
    per_loss_row_s: float
    optimizer_s: tuple[float, ...]
    relative_error: float  # half-width of the 90% interval over the value
    extrapolated: bool = False


class Forecast(NamedTuple):
    """From the cursors to the first finish or release."""

    rounds: int
    duration_ns: int
    task_ids: tuple[str, ...]
    exact: bool


# -------------------------------------------------------------------------------------- memory


class MemoryLedger(NamedTuple):
    """Bytes by item on one GPU of one pipeline stage."""

    stage: int
    items: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.items.values())


class StageLedgers(NamedTuple):
    """One ledger a stage, and the interval of the largest."""

    ledgers: tuple[MemoryLedger, ...]
    peak: Estimate


class SubgraphKind(enum.StrEnum):
    COMPUTE = "compute"
    COLLECTIVE = "collective"
    ADAPTER = "adapter"
    P2P = "p2p"
    OPTIMIZER = "optimizer"


class Subgraph(NamedTuple):
    """A schedulable piece of one hTask's pass on one stage."""

    index: int
    stage: int
    kind: SubgraphKind
    backward: bool
    depends_on: tuple[int, ...]
    label: str


class SubgraphTimes(NamedTuple):
    """Per hTask: its subgraphs and their seconds, in index order. ``contention``: factors by
    which a compute, and a communication kernel take longer while the other stream is busy."""

    subgraphs: tuple[tuple[Subgraph, ...], ...]
    times_s: tuple[tuple[float, ...], ...]
    extrapolated: bool
    contention: tuple[float, float] = (1.0, 1.0)


# ----------------------------------------------------------------------------------- instances


class InstanceSpec(NamedTuple):
    """One backbone replica set on one or more GPUs of one kind."""

    instance_id: str
    model: str
    device: str
    memory_limit_bytes: int
    replicas: tuple[ReplicaShape, ...] = (ReplicaShape(),)
    gpu_ids: tuple[str, ...] = ()  # instances that name the same GPU contend for it


class InstanceView(NamedTuple):
    """An instance as a planner sees it; rebuilt only on change. Pure input of ``plan``."""

    instance_id: str
    now_ns: int
    tasks: tuple[TaskView, ...]
    running_plan: Plan | None
    memory_limit_bytes: int
    corrections: Corrections = Corrections()
    model: str = ""
    device: str = ""
    replicas: tuple[ReplicaShape, ...] = (ReplicaShape(),)
    draining: frozenset[str] = frozenset()
    gpu_ids: tuple[str, ...] = ()  # instances that name the same GPU contend for it


# -------------------------------------------------------------------------------------- events


class EventKind(enum.IntEnum):
    """The order of kinds is the order of events of one instant: departures before arrivals, and a
    task arrives before it is ready."""

    INSTANCE_READY = 0
    INSTANCE_FAILED = 1
    INSTANCE_STOPPED = 2
    GPUS_DOWN = 3
    GPUS_UP = 4
    GPUS_NOTICE = 5  # they will be taken away soon
    PLAN_APPLIED = 10  # the plan of ``epoch`` took over at a round boundary
    PROGRESS = 11
    TASK_DONE = 20
    TASK_FAILED = 21
    TASK_RELEASED = 22  # a draining task reached its step boundary and left the instance
    TASK_CANCELLED = 23
    MEMORY_PRESSURE = 30
    DRIFT = 31  # raised by the engine
    PLACEMENT_REFUSED = 32  # raised by the engine: the planner could not take the task
    TASK_ARRIVED = 40
    TASK_READY = 41
    WAKE = 50


class TaskReadyData(NamedTuple):
    num_steps: int
    lengths: LengthSummary


class FailureData(NamedTuple):
    """``steps``: optimizer steps done, where the executor can tell. ``kept_steps``: of an instance
    that failed, by task: the steps that a checkpoint holds; ``lost_steps``: those after it."""

    message: str
    steps: int | None = None
    kept_steps: Mapping[str, int] = {}
    lost_steps: Mapping[str, int] = {}


class GpuData(NamedTuple):
    """``unit``: the GPU or node that failed, came back, or will be taken away."""

    gpu_ids: tuple[str, ...]
    unit: str
    message: str


class ResultData(NamedTuple):
    """What a finished task reports. Losses and perplexities are None in simulation."""

    steps: int
    effective_tokens: int
    output_path: str = ""
    final_loss: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None


class ProgressData(NamedTuple):
    """Since the last Progress of this plan epoch."""

    rounds: int
    duration_ns: int
    effective_tokens: int
    padded_tokens: int
    steps_done: Mapping[str, int]


class DriftData(NamedTuple):
    """Rounds of the event's plan took ``measured_s`` each, beyond what was ``predicted`` of one;
    from now on times are planned as ``time_percent`` of what the cost model says."""

    rounds: int
    measured_s: float
    predicted: Estimate
    time_percent: int


class PressureData(NamedTuple):
    used_bytes: int
    limit_bytes: int


class Event(NamedTuple):
    """Sorted by (time_ns, kind, ids); journalled in batches of one instant.

    ``data``: TaskSpec for TASK_ARRIVED, TaskReadyData, FailureData (TASK_FAILED,
    INSTANCE_FAILED), GpuData (GPUS_*), ResultData (TASK_DONE), ProgressData, DriftData,
    PressureData, Refusal (PLACEMENT_REFUSED), steps done as int (TASK_RELEASED,
    TASK_CANCELLED), else None.
    """

    time_ns: int
    kind: EventKind
    task_id: str = ""
    instance_id: str = ""
    epoch: int = NO_EPOCH
    data: object = None

    @property
    def sort_key(self) -> tuple[int, int, str, str, int]:
        return (self.time_ns, int(self.kind), self.task_id, self.instance_id, self.epoch)


# ------------------------------------------------------------------------------------- actions


class Place(NamedTuple):
    """Put a queued task onto an instance; the instance's planner may refuse."""

    task_id: str
    instance_id: str


class StartInstance(NamedTuple):
    spec: InstanceSpec


class StopInstance(NamedTuple):
    instance_id: str


class DrainInstance(NamedTuple):
    """Let all tasks of an instance leave at their next step boundary, place none there any
    longer, and stop it when the last has left."""

    instance_id: str


class Drain(NamedTuple):
    """Let a placed task leave at its next step boundary; it comes back queued."""

    task_id: str


class Reject(NamedTuple):
    task_id: str
    refusal: Refusal


class WakeAt(NamedTuple):
    time_ns: int


Action = Place | StartInstance | StopInstance | DrainInstance | Drain | Reject | WakeAt

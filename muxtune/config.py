"""Schemas of the configuration, registered with Hydra, and where its YAML files lie.

The schemas catch unknown keys and wrong types before any work starts. They are plain, not frozen
dataclasses, because Hydra cannot merge into frozen ones. ``planner``, ``cluster_policy`` and
``backend`` are open mappings: their options are those of the class that is built, which
``muxtune.build`` checks, so that a plug-in's options need no schema here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import muxtune

MISSING: Any = "???"  # OmegaConf's mark of a value that must be given
COMMANDS = ("plan", "simulate", "train", "profile", "validate", "compare", "capacity")


def conf_dir() -> Path:
    """The absolute folder of the YAML files: ``muxtune/conf`` in a wheel, else ``conf``."""
    package = Path(muxtune.__file__).resolve().parent
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parent / "conf"


@dataclass
class ModelConfig:
    """A base model. ``name`` is what tasks call it and what its shape is looked up by.

    ``path``: a folder in Hugging Face format or a GGUF file; empty: the weights that a package
    ships under ``name``, or none, which is enough to plan and to simulate. ``shape``: fields of
    ``muxtune.cost.shapes.ModelShape``, for a model that is not built in. ``random`` makes
    random weights of the shape, from ``seed``.
    """

    name: str = MISSING
    path: str = ""
    random: bool = False
    seed: int = 0
    shape: dict[str, Any] = field(default_factory=dict)


@dataclass
class PoolConfig:
    """Some of the fleet's GPUs: of one device, hosting one base model. What is left out is as in
    the cluster. ``model``: empty: the configured one. ``spot``: nodes that may be taken back."""

    num_gpus: int = MISSING
    device: str = ""
    model: str = ""
    tp: int = 1
    pp: int = 1
    spot: bool = False


@dataclass
class ReplicaConfig:
    """One replica of an instance: ``tp`` GPUs in each of ``pp`` stages."""

    tp: int = 1
    pp: int = 1


@dataclass
class FailuresConfig:
    """Hours of mean up-time of each GPU and node, exponentially distributed, 0: never; and what
    is lost. A node has ``gpus_per_node`` GPUs.

    ``spot_lifetime_h``: of the nodes of spot pools, until they are taken back; ``spot_notice_s``
    before that their tasks start to move away. ``checkpoint_steps``: optimizer steps between a
    task's checkpoints; what was done since is lost with its instance.
    """

    gpu_mtbf_h: float = 0.0
    gpu_repair_h: float = 4.0
    node_mtbf_h: float = 0.0
    node_repair_h: float = 8.0
    gpus_per_node: int = 8
    spot_lifetime_h: float = 0.0
    spot_notice_s: float = 120.0
    spot_absence_h: float = 1.0
    checkpoint_steps: int = 0
    seed: int = 0


@dataclass
class ElasticConfig:
    """How the number of instances follows the work; off unless ``enabled``.

    ``min_instances`` are kept; another is started for every ``tasks_per_instance`` tasks that wait
    for its model, and one that has been idle for ``idle_s`` is shut down.
    """

    enabled: bool = False
    min_instances: int = 1
    tasks_per_instance: int = 1
    idle_s: float = 600.0


@dataclass
class TenantConfig:
    """``max_tasks``: on instances at a time; null: any number. ``priority`` and ``deadline_s``
    (after arrival) are given to its tasks that have none of their own."""

    max_tasks: int | None = None
    priority: int = 0
    deadline_s: float | None = None


@dataclass
class ClusterConfig:
    """The fleet. ``device``: a name of the device table, or local: this machine.

    ``memory_limit_gb``: of each GPU, in units of 1e9 bytes, or auto: ``memory_share`` of what
    the device has. ``figures`` replaces single figures of the device. ``idle_power_share``: of its
    thermal design power, what an idle GPU draws; an assumption that energy depends on.

    ``replicas``: of each instance, which may differ in shape; then ``tp`` and ``pp`` stay 1, and
    ``num_gpus`` is a multiple of their GPUs. Empty: one of ``tp`` x ``pp``.
    ``pools``: several kinds of GPUs or base models; then ``num_gpus`` is their sum, and ``device``
    that of pools which name none. ``charge_startup``: instances take the time that the cost model
    says to start; ``charge_checkpoints``: tasks that move are written out at its price.
    ``tenants``: by name, the fields of ``TenantConfig``.
    ``preempt``: a waiting task of a higher priority takes the place of one of a lower.
    """

    device: str = MISSING
    num_gpus: int = 1
    tp: int = 1
    pp: int = 1
    instances_per_gpu: Any = 1
    memory_limit_gb: Any = "auto"
    memory_share: float = 0.9
    figures: dict[str, float] = field(default_factory=dict)
    idle_power_share: float = 0.1
    pools: list[PoolConfig] = field(default_factory=list)
    replicas: list[ReplicaConfig] = field(default_factory=list)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    tenants: dict[str, Any] = field(default_factory=dict)
    preempt: bool = False
    charge_startup: bool = False
    charge_checkpoints: bool = False


@dataclass
class CostConfig:
    """Which cost model: analytic, profile (``path``: what `muxtune profile` wrote) or, for the
    simulator, same (as the planner).

    How a system executes is a property of the costs, not of a policy; the analytic model takes it
    from ``style``: graph (captured passes, fused elementwise kernels) or eager (the host launches
    every kernel), and ``adapters``: grouped (one set of kernels for all adapters of a linear),
    separate (each adapter launches its own) or auto (grouped under graph, separate under eager).
    """

    kind: str = MISSING
    path: str = ""
    style: str = "graph"
    adapters: str = "auto"


@dataclass
class WorkloadConfig:
    """``limit``: the first tasks only; null: all."""

    kind: str = MISSING
    limit: int | None = None


@dataclass
class TasksWorkload(WorkloadConfig):
    """Tasks of a YAML file, or ``tasks`` (and ``task_defaults``) written out as in such a file."""

    kind: str = "tasks"
    tasks_file: str = ""
    task_defaults: dict[str, Any] = field(default_factory=dict)
    tasks: list[Any] = field(default_factory=list)


@dataclass
class TraceWorkload(WorkloadConfig):
    """Arrivals of a trace: "philly" or a CSV file. ``load``: offered load that arrival times are
    scaled to; null keeps them. ``mix``: what the trace does not tell; empty: the built-in mix.
    ``models``: base models with their popularity, for tasks that name none; empty: ``model``."""

    kind: str = "trace"
    trace: str = MISSING
    load: float | None = None
    seed: int = 0
    count_gpus: bool = False
    mix: list[Any] = field(default_factory=list)
    models: dict[str, float] = field(default_factory=dict)


@dataclass
class PoissonWorkload(WorkloadConfig):
    """Poisson arrivals, log-normal durations alone under HF PEFT. Exactly one of ``load`` and
    ``tasks_per_hour`` is given; ``limit`` is the number of tasks. ``models``: base models with
    their popularity; empty: ``model``. Tenants are popular as 1 / rank ** ``tenant_skew``;
    ``deadline_share`` of the tasks have a deadline, ``deadline_factor`` times their duration
    alone after their arrival."""

    kind: str = "poisson"
    limit: int | None = 100
    load: float | None = None
    tasks_per_hour: float | None = None
    mean_duration_s: float = 1800.0
    duration_sigma: float = 1.0
    seed: int = 0
    mix: list[Any] = field(default_factory=list)
    models: dict[str, float] = field(default_factory=dict)
    num_tenants: int = 1
    tenant_skew: float = 1.0
    deadline_share: float = 0.0
    deadline_factor: float = 3.0


@dataclass
class BurstyWorkload(PoissonWorkload):
    """Arrivals that come in bursts: ``peak_factor`` times the mean rate for ``burst_share`` of the
    time, ``tasks_per_burst`` tasks at a time in the mean."""

    kind: str = "bursty"
    peak_factor: float = 5.0
    burst_share: float = 0.1
    tasks_per_burst: float = 20.0


@dataclass
class CommonConfig:
    """What every command has."""

    command: str = MISSING
    output_dir: str = MISSING
    seed: int = 0
    planner: dict[str, Any] = field(default_factory=dict)
    cluster_policy: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = MISSING
    cluster: ClusterConfig = MISSING
    workload: WorkloadConfig = MISSING
    cost: CostConfig = MISSING


@dataclass
class PlanConfig(CommonConfig):
    """``state``: plan what line ``index`` of a saved plan_samples.jsonl asked, from scratch, and
    compare; ``format``: table or json; ``explain``: plan the same tasks in other ways too, to say
    why this one."""

    state: str = ""
    index: int = 0
    format: str = "table"
    explain: bool = True


@dataclass
class SimulateConfig(CommonConfig):
    """``simulator_cost`` is the truth of the simulation, ``cost`` what the planner believes."""

    simulator_cost: CostConfig = MISSING
    backend: dict[str, Any] = field(default_factory=dict)
    plan_samples: int = 100
    journal: bool = False


@dataclass
class TrainConfig(CommonConfig):
    """``resume``: go on with the killed run in ``output_dir``; on the command line also its
    folder, which brings the run's own settings along."""

    resume: bool = False
    backend: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProfileConfig(CommonConfig):
    """``budget_s``: seconds to spend on measuring. ``file`` is written into the output folder.

    ``program``: whose operations: captured, eager, or auto: as training runs on the device.
    ``deterministic``: as training is asked to run. ``steps``: measure a few whole steps too, which
    calibrate how operations add up, of up to ``max_rows`` rows (0: 8192 on a GPU, 512 on a CPU).
    ``clock``: wall, or cpu: the process's own time, for a CPU that others use too.
    """

    budget_s: float = 40.0
    file: str = "profile.json"
    program: str = "auto"
    deterministic: bool = True
    steps: bool = True
    max_rows: int = 0
    clock: str = "wall"


@dataclass
class ValidateConfig(CommonConfig):
    """``profile``: what `muxtune profile` wrote; its hash draws the suite. ``budget_s``: seconds
    for all of it; what is left then is done by the next run in the same folder; 0 scores and draws
    what is there. ``num_cases``: step configurations. ``models``: base models beside the profiled
    one, NAME or NAME:LAYERS; empty: two variants of it. ``max_rows``: of a micro-batch, 0: as
    profiled. ``case_s``: for the repeats of a case. ``dynamic_s``: about how long each of the three
    dynamic runs takes, 0: none. ``clock``: empty: as the profile was taken. ``min_rows``: of a
    micro-batch. ``own_every``: every so many single cases are of the profiled base model, where
    that has many more blocks than ``models``; 0: two of three. ``near_limit``: on a GPU, how many
    further cases nearly fill its memory."""

    profile: str = ""
    budget_s: float = 300.0
    num_cases: int = 240
    models: list[str] = field(default_factory=list)
    max_rows: int = 0
    max_tasks: int = 32
    case_s: float = 0.5
    dynamic_s: float = 20.0
    clock: str = ""
    min_rows: int = 0
    own_every: int = 0
    near_limit: int = 4


@dataclass
class CompareConfig(SimulateConfig):
    """``planners``: names to compare on the same tasks; empty: the one of ``planner``.
    ``steps``: optimizer steps of each task, in place of its own; null keeps them."""

    planners: list[str] = field(default_factory=list)
    steps: int | None = None
    torch: dict[str, Any] = field(default_factory=dict)


@dataclass
class ServiceLevelConfig:
    """``share`` of the tasks start within ``max_start_delay_s`` of their arrival and end within
    ``max_slowdown`` times what they take alone under HF PEFT on the device of ``cluster``, counted
    from their start (``slowdown_from=start``) or from their arrival."""

    share: float = 0.95
    max_start_delay_s: float = 600.0
    max_slowdown: float = 3.0
    slowdown_from: str = "start"


@dataclass
class SensitivityConfig:
    """How far the assumptions are moved, one at a time, around the answer. ``load``, ``lengths``
    and ``times`` (what the cost model says): relative changes; null for ``times``: the cost
    model's own 90% interval. ``price``: null takes the low and high price of the device table.
    ``num_seeds``: draws to average over, the first of those of the answer; 0: none of this."""

    load: float = 0.2
    lengths: float = 0.2
    times: float | None = None
    price: float | None = None
    num_seeds: int = 2


# One task a GPU twice: what a saving owes to fast kernels is not owed to sharing.
CAPACITY_POLICIES = ("exclusive", "exclusive_fast", "batched", "muxtune")


@dataclass
class CapacityConfig(SimulateConfig):
    """The question of `muxtune capacity`. ``cluster`` is the reference: the device on which a
    task's time alone is counted and, for a workload with a load, the fleet that it loads.

    ``policies``: options of the group planner, or {name: ..., settings: [...]}; "all" for every
    one. ``devices``: kinds to choose from; empty: that of ``cluster``. One name alone needs no
    brackets in either. ``prices``: USD per GPU and
    hour; what is not given comes from the device table, with its date. ``num_seeds``: draws of
    the tasks. ``max_gpus``: of one base model. ``warmup_share``: first part of the arrivals that
    is not counted. ``workers``: processes; 0: one a core."""

    policies: Any = field(default_factory=lambda: list(CAPACITY_POLICIES))
    baseline: str = "exclusive"
    devices: Any = field(default_factory=list)
    prices: dict[str, float] = field(default_factory=dict)
    service_level: ServiceLevelConfig = field(default_factory=ServiceLevelConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    num_seeds: int = 5
    max_gpus: int = 512
    warmup_share: float = 0.1
    hours_per_month: float = 730.0
    workers: int = 0

    def __post_init__(self) -> None:
        self.policies = _as_list(self.policies)
        self.devices = _as_list(self.devices)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


_COMMAND_SCHEMAS: dict[str, type[CommonConfig]] = {
    "plan": PlanConfig,
    "simulate": SimulateConfig,
    "train": TrainConfig,
    "profile": ProfileConfig,
    "validate": ValidateConfig,
    "compare": CompareConfig,
    "capacity": CapacityConfig,
}
_GROUP_SCHEMAS: tuple[tuple[str, str, type[Any]], ...] = (
    ("model", "base_model", ModelConfig),
    ("cluster", "base_cluster", ClusterConfig),
    ("cost", "base_cost", CostConfig),
    ("workload", "base_tasks", TasksWorkload),
    ("workload", "base_trace", TraceWorkload),
    ("workload", "base_poisson", PoissonWorkload),
    ("workload", "base_bursty", BurstyWorkload),
)
OPEN_GROUPS = ("planner", "cluster_policy", "backend")
_ENTRY_POINTS = {"planner": "muxtune.planners", "cluster_policy": "muxtune.cluster_policies"}


def register_schemas() -> None:
    """Put the schemas, and one group option for each planner and cluster policy that another
    package adds by entry point, into Hydra's store. Repeating it changes nothing."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for command, schema in _COMMAND_SCHEMAS.items():
        store.store(name=f"base_{command}", node=_schema(schema))
    for group, name, schema in _GROUP_SCHEMAS:
        store.store(group=group, name=name, node=_schema(schema))
    for group in OPEN_GROUPS:
        store.store(group=group, name=f"base_{group}", node=_open({"name": MISSING}))
    for group, entry_group in _ENTRY_POINTS.items():
        for entry in entry_points(group=entry_group):
            store.store(group=group, name=entry.name, node=_open({"name": entry.name}))


def _schema(schema: type[Any]) -> Any:
    """Prices are of devices, and popularity of base models, that no schema knows by name."""
    from omegaconf import OmegaConf

    node = OmegaConf.structured(schema)
    for name in ("prices", "models"):
        if hasattr(schema, name) or name in schema.__dataclass_fields__:
            OmegaConf.set_struct(node[name], False)
    return node


def _open(content: dict[str, Any]) -> Any:
    """A mapping that takes keys it does not have yet."""
    from omegaconf import OmegaConf

    return OmegaConf.create(content, flags={"struct": False})

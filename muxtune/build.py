"""From a configuration to the objects that run: explicit tables of builders, no import by name.

Parts that need torch or simpy are imported when they are built, so that planning needs neither.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from muxtune.alone import Alone, hf_peft_alone, kind_of
from muxtune.cluster_policies.lifecycle import Lifecycle, LifecycleOptions
from muxtune.config import (
    BurstyWorkload,
    ClusterConfig,
    CommonConfig,
    CostConfig,
    ModelConfig,
    PoissonWorkload,
    TasksWorkload,
    TenantConfig,
    TraceWorkload,
    WorkloadConfig,
)
from muxtune.cost.analytic import AnalyticOptions
from muxtune.cost.book import ANALYTIC, EXTRAPOLATED, MEASURED, CostBook
from muxtune.cost.devices import GENERIC_CPU, DeviceFigures, checked_figures, device_figures
from muxtune.cost.schema import Profile, load_profile, profile_warnings
from muxtune.cost.shapes import ModelShape, checked_shape, from_hf_config, model_shape
from muxtune.cost.shipped import profile_path, shipped_profiles
from muxtune.deciding import EngineOptions
from muxtune.errors import ConfigError
from muxtune.hardware import NO_FAILURES, FailureRules, NodeSpec, TenantRules
from muxtune.protocols import ClusterPolicy, InstancePlanner, TaskLibrary
from muxtune.registry import CLUSTER_POLICIES, PLANNERS, Registry
from muxtune.report.metrics import PowerDraw
from muxtune.types import InstanceSpec, ReplicaShape, TaskSpec
from muxtune.workload.arrivals import Bursts, People
from muxtune.workload.libraries import MixedLibrary, MixedTextLibrary
from muxtune.workload.mix import DEFAULT_MIX, task_mix
from muxtune.workload.random_texts import RandomTexts
from muxtune.workload.synthetic import SyntheticLibrary, tokenizer_of
from muxtune.workload.tasks import load_tasks, tasks_from_mapping, with_model_targets
from muxtune.workload.tenants import TenantTasks
from muxtune.workload.traces import poisson_tasks, read_trace, trace_tasks

if TYPE_CHECKING:
    from muxtune.runtime.backbone import BackboneStore

GB = 1_000_000_000
S_PER_HOUR = 3_600.0
LOCAL, AUTO = "local", "auto"
Tasks = Sequence[TaskSpec] | Any  # a list, or a TaskStream


# ------------------------------------------------------------------------------ planner and policy


def planner(options: Mapping[str, Any], costs: CostBook) -> InstancePlanner:
    """Raises ConfigError for an unknown planner, or an option that it does not have."""
    return _from_registry(PLANNERS, options, {"costs": costs})


def cluster_policy(options: Mapping[str, Any]) -> ClusterPolicy:
    """Raises ConfigError for an unknown policy, or an option that it does not have."""
    return _from_registry(CLUSTER_POLICIES, options, {})


def _from_registry(registry: Registry, options: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    rest = {key: value for key, value in options.items() if key != "name"}
    factory = registry.get(str(options.get("name", "")))
    return call_checked(factory, registry.field, rest, given)


def call_checked(
    factory: Callable[..., Any], field: str, options: Mapping[str, Any], given: Mapping[str, Any]
) -> Any:
    """``factory(**given, **options)``, the options checked by its signature.

    Raises ConfigError: ``field`` and option, what is wrong, and the options that exist.
    """
    parameters = inspect.signature(factory).parameters
    known = [name for name in parameters if name not in given and name != "self"]
    takes_any = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    for name, value in options.items():
        if name in given or (name not in parameters and not takes_any):
            remedy = f"Choose among: {', '.join(known) or 'it takes no options'}"
            raise ConfigError(f"{field}.{name}", "is no option of this " + field, remedy)
        _check_type(f"{field}.{name}", value, parameters.get(name))
    return factory(**given, **options)


def _check_type(field: str, value: object, parameter: inspect.Parameter | None) -> None:
    """The type of an option's default tells what it must be."""
    default = None if parameter is None else parameter.default
    if default is None or default is inspect.Parameter.empty or value is None:
        return
    whole_for_float = isinstance(default, float) and isinstance(value, int)
    if type(value) is not type(default) and not whole_for_float:
        problem = f"{value!r} is not of type {type(default).__name__}"
        raise ConfigError(field, problem, f"The default is {default!r}")


# ------------------------------------------------------------------------------------------- costs


def cost_book(config: CommonConfig, cost: CostConfig | None = None) -> CostBook:
    """The book of ``cost`` (default: the planner's). Raises ConfigError or ProfileError."""
    cost = cost or config.cost
    check_cluster(config.cluster)
    return CostBook(
        models={config.model.name: shape_of(config.model)},
        devices={device_name(config.cluster, cost): figures_of(config.cluster)},
        profiles=_profiles(cost),
        options=_analytic_options(cost),
        similar_models=all(instance_gpus(cluster) == 1 for cluster, _, _ in pools(config)),
    )


def published_costs(config: CommonConfig) -> CostBook:
    """``cost_book`` of how the system executes that published the planner: where ``cost.style``
    says eagerly, a profile of captured steps says nothing."""
    book = cost_book(config)
    return book.with_options(book.options)


def notes_on_costs(costs: CostBook, instances: Sequence[InstanceSpec]) -> list[str]:
    """A note for every base model and device that nothing was measured of."""
    pairs = dict.fromkeys((item.model, item.device) for item in instances)
    return [note for pair in pairs if (note := costs.note(*pair))]


def notes_on_profiles(costs: CostBook) -> list[str]:
    """What a profile says of itself: that the device was busy or shared while it was measured."""
    return [line for profile in costs.profiles for line in profile_warnings(profile)]


def origin_of_times(costs: CostBook, instances: Sequence[InstanceSpec]) -> str:
    """For a run's summary: the least that is known of any of its predicted times, see
    ``CostBook.origin``."""
    found = {costs.origin(item.model, item.device) for item in instances}
    return next((kind for kind in (ANALYTIC, EXTRAPOLATED) if kind in found), MEASURED)


def simulator_book(config: CommonConfig, simulator_cost: CostConfig, planner_book: CostBook) -> Any:
    """The planner's own book for ``same``; else a book of its own."""
    return planner_book if simulator_cost.kind == "same" else cost_book(config, simulator_cost)


def _profiles(cost: CostConfig) -> list[Profile]:
    if cost.kind not in {"analytic", "profile"}:
        remedy = "Choose analytic or profile"
        raise ConfigError("cost.kind", f"'{cost.kind}' does not exist", remedy)
    if cost.kind == "profile" and not cost.path:
        remedy = "Give what `muxtune profile` wrote, with cost.path=FILE"
        if shipped := shipped_profiles():
            remedy += f", or the name of a shipped one: {', '.join(shipped)}"
        raise ConfigError("cost.path", "is empty", remedy)
    if cost.kind != "profile" and cost.path:
        problem = f"is given, but cost={cost.kind} reads no profile"
        raise ConfigError("cost.path", problem, "Choose cost=profile, or leave the path out")
    return [load_profile(profile_path(cost.path))] if cost.kind == "profile" else []


def _analytic_options(cost: CostConfig) -> AnalyticOptions:
    styles = {"graph": AnalyticOptions, "eager": AnalyticOptions.eager}
    if cost.style not in styles:
        remedy = f"Choose one of: {', '.join(styles)}"
        raise ConfigError("cost.style", f"'{cost.style}' does not exist", remedy)
    made = styles[cost.style]()
    grouped = {AUTO: made.grouped_adapters, "grouped": True, "separate": False}
    if cost.adapters not in grouped:
        remedy = f"Choose one of: {', '.join(grouped)}"
        raise ConfigError("cost.adapters", f"'{cost.adapters}' does not exist", remedy)
    return made._replace(grouped_adapters=grouped[cost.adapters])


def shape_of(model: ModelConfig) -> ModelShape:
    """The model's shape: written out, read from its folder, or built in under its name."""
    if model.shape:
        try:
            return checked_shape(ModelShape(name=model.name, **model.shape))
        except TypeError as error:
            fields = ", ".join(ModelShape._fields[1:])
            raise ConfigError("model.shape", str(error), f"The fields are: {fields}") from None
    file = Path(model.path) / "config.json"
    if model.path and file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        return from_hf_config(SimpleNamespace(**content), model.name)
    try:
        return model_shape(model.name)
    except ConfigError:
        if not model.path:
            raise
        problem = "is not there" if not Path(model.path).exists() else "holds no config.json"
        remedy = f"Give a folder with config.json and weights; no shape is known as '{model.name}'"
        raise ConfigError("model.path", f"'{model.path}' {problem}", remedy) from None


def figures_of(cluster: ClusterConfig) -> DeviceFigures:
    if cluster.device == LOCAL:
        local = GENERIC_CPU._replace(memory_bytes=physical_memory_bytes())
        return checked_figures(local._replace(**cluster.figures))
    return device_figures(cluster.device, cluster.figures)


def power_draw(
    config: CommonConfig, instances: Sequence[InstanceSpec], costs: CostBook
) -> PowerDraw:
    """What the devices of a fleet draw, from their thermal design power."""
    share = config.cluster.idle_power_share
    if not 0 <= share <= 1:
        raise ConfigError("cluster.idle_power_share", f"is {share}", "Give a number in [0, 1]")
    devices = {spec.device for spec in instances}
    power_w = {}
    for device in devices:
        with suppress(ConfigError):  # a profiled device that no table knows
            power_w[device] = costs.figures(device).power_w
    return PowerDraw(power_w, share)


def device_name(cluster: ClusterConfig, cost: CostConfig) -> str:
    """``local`` is the machine that the profile was measured on, or a CPU."""
    if cluster.device != LOCAL:
        return cluster.device
    return (
        load_profile(profile_path(cost.path)).device_name
        if cost.kind == "profile"
        else GENERIC_CPU.name
    )


def physical_memory_bytes() -> int:
    """Memory of this machine, or the limit of its control group if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


# --------------------------------------------------------------------------------------- the fleet


def instances(config: CommonConfig, costs: CostBook, tasks: Tasks = ()) -> list[InstanceSpec]:
    """The instances that the fleet has room for; ids and GPU ids sort as they are numbered.

    ``tasks`` are looked at only for ``instances_per_gpu=auto``. Raises ConfigError for numbers
    that do not go together.
    """
    per_gpu = _instances_per_gpu(config, costs, tasks)
    places = [
        (cluster, model, first_gpu)
        for cluster, model, first_gpu in pools(config)
        for first_gpu in range(first_gpu, first_gpu + cluster.num_gpus, instance_gpus(cluster))
        for _ in range(per_gpu)
    ]
    check_dealing(config)
    width = len(str(len(places) - 1))
    return [
        InstanceSpec(
            f"instance-{number:0{width}d}",
            model,
            device_name(cluster, config.cost),
            gpu_memory_limit_bytes(cluster) // per_gpu,
            replicas_of(cluster),
            tuple(gpu_name(first_gpu + i) for i in range(instance_gpus(cluster))),
        )
        for number, (cluster, model, first_gpu) in enumerate(places)
    ]


def gpu_name(number: int) -> str:
    return f"gpu-{number:05d}"


def pools(config: CommonConfig) -> list[tuple[ClusterConfig, str, int]]:
    """Each pool as a cluster of its own, the model it hosts, and the number of its first GPU."""
    cluster, found, first_gpu = config.cluster, [], 0
    check_cluster(cluster)
    if not cluster.pools:
        return [(cluster, config.model.name, 0)]
    for pool in cluster.pools:
        changes: dict[str, Any] = {
            "num_gpus": pool.num_gpus,
            "tp": pool.tp,
            "pp": pool.pp,
            "pools": [],
        }
        one = replace(cluster, device=pool.device or cluster.device, **changes)
        if pool.device and pool.device != cluster.device:
            one = replace(one, figures={})  # they are of the cluster's own device
        check_cluster(one)
        found.append((one, pool.model or config.model.name, first_gpu))
        first_gpu += pool.num_gpus
    return found


def num_gpus(cluster: ClusterConfig) -> int:
    return sum(pool.num_gpus for pool in cluster.pools) if cluster.pools else cluster.num_gpus


def hosted_models(config: CommonConfig) -> set[str]:
    return {model for _, model, _ in pools(config)}


def fleet_policy(
    config: CommonConfig, slots: Sequence[InstanceSpec]
) -> tuple[ClusterPolicy, Sequence[InstanceSpec]]:
    """The cluster policy, in a ``Lifecycle`` where the fleet's size or state may change, and the
    instances to begin with."""
    cluster = config.cluster
    policy, elastic = cluster_policy(config.cluster_policy), cluster.elastic
    if not fleet_changes(cluster):
        return policy, slots
    options = LifecycleOptions(
        elastic.enabled,
        elastic.min_instances,
        elastic.tasks_per_instance,
        elastic.idle_s,
        cluster.preempt,
    )
    around = Lifecycle(policy, slots, options)
    return around, around.first_instances()


def fleet_changes(cluster: ClusterConfig) -> list[str]:
    """The settings by which the fleet's size or state changes during a run; none by default."""
    changes = {
        "cluster.elastic": cluster.elastic.enabled,
        "cluster.preempt": cluster.preempt,
        "cluster.failures": failure_rules(cluster) != NO_FAILURES,
    }
    return [field for field, is_on in changes.items() if is_on]


def check_fleet_stays(cluster: ClusterConfig) -> None:
    """Raises ConfigError for what only a simulated fleet does."""
    for field in fleet_changes(cluster):
        problem = "is for simulated fleets: real instances neither come, go, fail nor preempt"
        raise ConfigError(field, problem, "Leave it off, or play it with `muxtune simulate`")


def engine_options(config: CommonConfig, tell_waits: bool = True) -> EngineOptions:
    """With the quotas of tenants. Raises ConfigError for one below 1."""
    rules = {}
    for name, tenant in tenants(config.cluster).items():
        if tenant.max_tasks is not None and tenant.max_tasks < 1:
            field = f"cluster.tenants.{name}.max_tasks"
            raise ConfigError(field, f"is {tenant.max_tasks}", "Give at least 1, or null")
        rules[name] = TenantRules(tenant.max_tasks)
    return EngineOptions(tenants=rules, tell_waits=tell_waits)


def tenants(cluster: ClusterConfig) -> dict[str, TenantConfig]:
    """Raises ConfigError for a field that a tenant does not have, or of another type."""
    return {
        name: call_checked(TenantConfig, f"cluster.tenants.{name}", dict(given), {})
        for name, given in cluster.tenants.items()
    }


def failure_rules(cluster: ClusterConfig) -> FailureRules:
    """Raises ConfigError for a negative number."""
    failures = cluster.failures
    for name in ("gpu_mtbf_h", "node_mtbf_h", "spot_lifetime_h", "gpu_repair_h", "node_repair_h",
                 "spot_notice_s", "spot_absence_h", "checkpoint_steps"):  # fmt: skip
        value = getattr(failures, name)
        if not 0 <= value < 1e9:
            raise ConfigError(f"cluster.failures.{name}", f"is {value}", "Give 0 or more")
    if not (failures.gpu_mtbf_h or failures.node_mtbf_h or failures.spot_lifetime_h):
        return NO_FAILURES
    return FailureRules(
        failures.gpu_mtbf_h * S_PER_HOUR,
        failures.gpu_repair_h * S_PER_HOUR,
        failures.node_mtbf_h * S_PER_HOUR,
        failures.node_repair_h * S_PER_HOUR,
        failures.spot_lifetime_h * S_PER_HOUR,
        failures.spot_notice_s,
        failures.spot_absence_h * S_PER_HOUR,
        failures.seed,
    )


def hardware_options(config: CommonConfig) -> dict[str, Any]:
    """What the simulated executor has to know of the cluster, as options of ``SimOptions``."""
    cluster = config.cluster
    rules = failure_rules(cluster)
    return {
        "nodes": nodes(config) if rules != NO_FAILURES else (),
        "failures": rules,
        "checkpoint_steps": cluster.failures.checkpoint_steps,
        "charge_startup": cluster.charge_startup,
        "charge_checkpoints": cluster.charge_checkpoints,
    }


def nodes(config: CommonConfig) -> tuple[NodeSpec, ...]:
    """GPUs by node; a node's GPUs are all of one pool."""
    size = config.cluster.failures.gpus_per_node
    if size < 1:
        raise ConfigError("cluster.failures.gpus_per_node", f"is {size}", "Give at least 1")
    spot = [pool.spot for pool in config.cluster.pools] or [False]
    found: list[NodeSpec] = []
    for (cluster, _, first), is_spot in zip(pools(config), spot, strict=True):
        for start in range(first, first + cluster.num_gpus, size):
            stop = min(start + size, first + cluster.num_gpus)
            names = tuple(gpu_name(number) for number in range(start, stop))
            found.append(NodeSpec(f"node-{len(found):04d}", names, is_spot))
    return tuple(found)


def check_cluster(cluster: ClusterConfig) -> None:
    """Raises ConfigError for counts that are not positive or do not divide."""
    for name in ("num_gpus", "tp", "pp"):
        if getattr(cluster, name) < 1:
            raise ConfigError(f"cluster.{name}", f"is {getattr(cluster, name)}", "Give at least 1")
    for index, replica in enumerate(cluster.replicas):
        if replica.tp < 1 or replica.pp < 1:
            problem = f"is tp={replica.tp}, pp={replica.pp}"
            raise ConfigError(f"cluster.replicas[{index}]", problem, "Give at least 1 each")
    if cluster.replicas and (cluster.pools or cluster.tp * cluster.pp > 1):
        remedy = "Write all replicas out, and leave cluster.tp, cluster.pp and cluster.pools alone"
        raise ConfigError("cluster.replicas", "is given beside tp, pp or pools", remedy)
    if cluster.num_gpus % instance_gpus(cluster):
        what = "the replicas' GPUs" if cluster.replicas else "tp * pp"
        raise ConfigError(
            "cluster.num_gpus",
            f"{cluster.num_gpus} is no multiple of {what} = {instance_gpus(cluster)}",
            "Change one of them",
        )


def replicas_of(cluster: ClusterConfig) -> tuple[ReplicaShape, ...]:
    """Of each instance."""
    if not cluster.replicas:
        return (ReplicaShape(cluster.tp, cluster.pp),)
    return tuple(ReplicaShape(replica.tp, replica.pp) for replica in cluster.replicas)


def instance_gpus(cluster: ClusterConfig) -> int:
    return sum(replica.num_gpus for replica in replicas_of(cluster))


def check_dealing(config: CommonConfig) -> None:
    """Raises ConfigError where a planner would leave all replicas but the first out of account."""
    name = str(config.planner.get("name", ""))
    if len(config.cluster.replicas) < 2 or getattr(PLANNERS.get(name), "deals_replicas", False):
        return
    problem = f"are several, but the planner '{name}' plans a single one"
    raise ConfigError("cluster.replicas", problem, "Choose planner=lobra, or one replica")


def gpu_memory_limit_bytes(cluster: ClusterConfig) -> int:
    """Raises ConfigError for a limit that is not positive or a share outside of (0, 1]."""
    if cluster.memory_limit_gb == AUTO:
        if not 0 < cluster.memory_share <= 1:
            problem = f"is {cluster.memory_share}"
            raise ConfigError("cluster.memory_share", problem, "Give a number in (0, 1]")
        return int(figures_of(cluster).memory_bytes * cluster.memory_share)
    try:
        limit = float(cluster.memory_limit_gb)
    except (TypeError, ValueError):
        limit = 0.0
    if not 0 < limit < 1e6:
        problem = f"'{cluster.memory_limit_gb}' is no amount of memory"
        raise ConfigError("cluster.memory_limit_gb", problem, "Give gigabytes above 0, or auto")
    return int(limit * GB)


def _instances_per_gpu(config: CommonConfig, costs: CostBook, tasks: Tasks) -> int:
    number = config.cluster.instances_per_gpu
    if number == AUTO:
        return _colocated(config, costs, tasks)
    if not isinstance(number, int) or number < 1:
        problem = f"is {number!r}"
        raise ConfigError("cluster.instances_per_gpu", problem, "Give at least 1, or auto")
    return number


def _colocated(config: CommonConfig, costs: CostBook, tasks: Tasks) -> int:
    """As many instances a GPU as fit when each runs the most demanding task."""
    alone = _alone(config, costs)
    kinds = {kind_of(task): task for task in tasks}
    needed = max((alone.peak_bytes(task) for task in kinds.values()), default=0)
    return max(1, int(gpu_memory_limit_bytes(config.cluster) // needed)) if needed else 1


# ------------------------------------------------------------------------------------------- tasks


def _alone(config: CommonConfig, costs: CostBook) -> Alone:
    """Drawn tasks alone on one instance of the cluster's device under HF PEFT."""
    device = device_name(config.cluster, config.cost)
    return hf_peft_alone(costs, SyntheticLibrary(config.seed), config.model.name, device)


def tasks(config: CommonConfig, costs: CostBook) -> Tasks:
    """Tasks sorted by arrival: a list, or for traces a stream that makes them lazily.

    Raises ConfigError or DataError that names the field or the file and the remedy.
    """
    found = _TASK_BUILDERS[_known_kind(config.workload)](config, costs)
    given = tenants(config.cluster)
    if any(tenant.priority or tenant.deadline_s for tenant in given.values()):
        return TenantTasks(found, given)
    return found


def _known_kind(workload: WorkloadConfig) -> str:
    if workload.kind not in _TASK_BUILDERS:
        remedy = f"Choose one of: {', '.join(_TASK_BUILDERS)}"
        raise ConfigError("workload.kind", f"'{workload.kind}' does not exist", remedy)
    return workload.kind


def _declared_tasks(config: CommonConfig, costs: CostBook) -> list[TaskSpec]:
    workload = config.workload
    assert isinstance(workload, TasksWorkload)
    if workload.tasks_file:
        found = load_tasks(workload.tasks_file)
    elif workload.tasks:
        content = {"defaults": workload.task_defaults, "tasks": workload.tasks}
        found = tasks_from_mapping(content, source="workload")
    else:
        remedy = "Give workload.tasks_file=FILE, or workload=example, philly or poisson"
        raise ConfigError("workload.tasks_file", "is empty", remedy)
    resolved = (_resolver(config, costs)(task) for task in found)
    return sorted(resolved, key=lambda task: task.arrival_ns)[: workload.limit]


def _trace(config: CommonConfig, costs: CostBook) -> Any:
    workload = config.workload
    assert isinstance(workload, TraceWorkload)
    return trace_tasks(
        read_trace(workload.trace),
        _mix(workload.mix, config),
        _alone(config, costs).tokens_per_s,
        load=workload.load,
        num_gpus=num_gpus(config.cluster),
        seed=workload.seed,
        limit=workload.limit,
        count_gpus=workload.count_gpus,
        resolve=_resolver(config, costs),
    )


def _poisson(config: CommonConfig, costs: CostBook) -> Any:
    workload = config.workload
    assert isinstance(workload, PoissonWorkload)
    return poisson_tasks(
        _mix(workload.mix, config),
        _alone(config, costs).tokens_per_s,
        num_tasks=100 if workload.limit is None else workload.limit,
        load=workload.load,
        tasks_per_hour=workload.tasks_per_hour,
        mean_duration_s=workload.mean_duration_s,
        duration_sigma=workload.duration_sigma,
        num_gpus=num_gpus(config.cluster),
        seed=workload.seed,
        resolve=_resolver(config, costs),
        bursts=_options_of(Bursts, workload) if isinstance(workload, BurstyWorkload) else None,
        people=_options_of(People, workload),
    )


def _options_of(kind: Any, workload: PoissonWorkload) -> Any:
    """The fields that ``kind`` and the workload share by name."""
    return kind(*(getattr(workload, name) for name in kind._fields))


_TASK_BUILDERS: dict[str, Callable[[CommonConfig, CostBook], Tasks]] = {
    "tasks": _declared_tasks,
    "trace": _trace,
    "poisson": _poisson,
    "bursty": _poisson,
}


def _mix(entries: list[Any], config: CommonConfig) -> Any:
    models = getattr(config.workload, "models", None) or config.model.name
    return task_mix(entries or DEFAULT_MIX, model=models, where="workload.mix")


def _resolver(config: CommonConfig, costs: CostBook) -> Callable[[TaskSpec], TaskSpec]:
    """Gives a task the fleet's model if it names none; checks its histogram and its targets."""

    hosted = hosted_models(config)
    if config.command == "capacity":  # which gives every base model GPUs of its own
        hosted |= set(getattr(config.workload, "models", ()))
    names = " and ".join(f"'{name}'" for name in sorted(hosted))

    def resolve(task: TaskSpec) -> TaskSpec:
        task = task if task.model else task._replace(model=config.model.name)
        if task.model not in hosted:
            raise ConfigError(
                f"task '{task.task_id}': model",
                f"'{task.model}' is not what the fleet hosts, which is {names}",
                "Change it, or choose the fleet's with model=NAME",
            )
        if task.data.histogram:
            where = f"task '{task.task_id}': histogram"
            tokenizer_of(task.data.histogram, task.data.tokenizer, where)
        return with_model_targets(task, list(costs.shape(task.model).linears))

    return resolve


def library(config: CommonConfig, store: BackboneStore | None = None) -> MixedLibrary:
    """``store`` is made when it is needed, for its tokenizer."""
    return MixedLibrary(
        SyntheticLibrary(config.seed), lambda: dataset_library(store or backbone_store(config))
    )


def sim_library(config: CommonConfig, found: Tasks) -> TaskLibrary:
    """What the simulator packs: the plain synthetic library where no task has real data."""
    return SyntheticLibrary(config.seed) if is_drawn(found) else library(config)


def is_drawn(found: Tasks) -> bool:
    """True when no task has real data; then the plain SyntheticLibrary does."""
    if isinstance(found, TenantTasks):
        found = found.unwrapped
    return not isinstance(found, list) or all(task.data.histogram for task in found)


# ---------------------------------------------------------------------------------------- backends


def sim_executor(
    options: Mapping[str, Any],
    costs: Any,
    found: TaskLibrary,
    hardware: Mapping[str, Any] = {},
) -> Any:
    """A ``SimExecutor``; ``hardware``: see ``hardware_options``. Raises ConfigError for an option
    that it does not have."""
    from muxtune_sim.executor import SimExecutor
    from muxtune_sim.options import SimOptions, make_builder

    rest = _without_name(options, "sim", "backend")
    made: SimOptions = call_checked(SimOptions, "backend", rest, hardware)
    return SimExecutor(make_builder(made), costs, found, made)


def torch_executor(
    options: Mapping[str, Any],
    output_dir: Path,
    store: BackboneStore,
    datasets: Any,
    listeners: Sequence[Any] = (),
    field: str = "backend",
    make_instance: Callable[..., Any] | None = None,
) -> Any:
    """A ``TorchExecutor``. Raises ConfigError for an option that it does not have."""
    from muxtune.planning.step_builder import StepBuilder
    from muxtune.runtime.executor import TorchExecutor
    from muxtune.runtime.options import TorchOptions

    rest = _without_name(options, "torch", field)
    made = call_checked(TorchOptions, field, rest, {"output_dir": output_dir})
    made.check(field)
    if make_instance is not None and made.lora_products != "fused":
        problem = "several ranks of a replica know no windows"
        raise ConfigError(f"{field}.lora_products", problem, "Leave it out")
    return TorchExecutor(
        StepBuilder(), store, datasets, made, listeners, make_instance=make_instance
    )


def _without_name(options: Mapping[str, Any], expected: str, field: str) -> dict[str, Any]:
    if options.get("name") != expected:
        problem = f"this command runs on '{expected}', not on '{options.get('name')}'"
        raise ConfigError(field, problem, f"Choose {field}={expected}")
    return {key: value for key, value in options.items() if key != "name"}


def dataset_library(store: BackboneStore) -> Any:
    from muxtune.workload.datasets import DatasetLibrary

    return DatasetLibrary(store.tokenizer)


def text_library(config: CommonConfig, store: BackboneStore) -> Any:
    """What real tasks train on: their data; random tokens of drawn lengths where the base model
    is random too."""
    if not config.model.random:
        return dataset_library(store)
    drawn = RandomTexts(shape_of(config.model).vocab, config.seed)
    return MixedTextLibrary(drawn, lambda: dataset_library(store))


def backbone_store(config: CommonConfig) -> BackboneStore:
    """Where the real executor and the tokenizers find the base model. Needs the train extra."""
    need_torch()
    from muxtune.runtime import backbone

    model = config.model
    device, dtype = where_to_compute(config)
    sources: dict[str, Any] = {}
    if model.random:
        shape = shape_of(model)
        sources[model.name] = backbone.random_weights(shape, model.seed, device, dtype)
    elif model.path:
        is_file = Path(model.path).suffix == ".gguf"
        make = backbone.gguf_file if is_file else backbone.local_folder
        sources[model.name] = make(model.path)
    return backbone.BackboneStore(sources, device, dtype)


def where_to_compute(config: CommonConfig) -> tuple[Any, Any]:
    """Device and dtype of the base model, by the real executor's options.

    Raises ConfigError for one that does not exist, or CUDA where torch sees none.
    """
    import torch

    chosen = getattr(config, "torch", None) or getattr(config, "backend", None) or {}
    device, dtype = str(chosen.get("device", AUTO)), str(chosen.get("dtype", AUTO))
    has_cuda = torch_sees_cuda()
    if device == AUTO:
        wants_gpu = figures_of(config.cluster).kind == "gpu"
        device = "cuda" if wants_gpu and has_cuda else "cpu"
    if device not in {"cpu", "cuda"} or (device == "cuda" and not has_cuda):
        problem = f"torch sees no '{device}'"
        raise ConfigError("backend.device", problem, "Choose cpu, or auto")
    if dtype == AUTO:
        dtype = "bfloat16" if device == "cuda" else "float32"
    if dtype not in {"float32", "bfloat16", "float16"}:
        remedy = "Choose float32, bfloat16 or auto"
        raise ConfigError("backend.dtype", f"'{dtype}' is no type to train with", remedy)
    return torch.device(device), getattr(torch, dtype)


def torch_sees_cuda() -> bool:
    import torch

    # Asked of the driver's library, because ranks that are forked could not use CUDA otherwise.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return torch.cuda.is_available()


def check_adapter(task: TaskSpec) -> None:
    """What its method says of a task's settings, before any model is loaded. Raises ConfigError."""
    from muxtune.runtime.adapters import adapter_method

    try:
        adapter_method(task.adapter.method).check(task.adapter)
    except ConfigError as error:
        raise ConfigError(
            f"task '{task.task_id}': {error.field}", error.problem, error.remedy
        ) from None


def need_torch() -> None:
    """Raises ConfigError when what the real executor needs is not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        remedy = 'Install torch, then `pip install -e ".[train]"` in a clone'
        raise ConfigError("backend", f"{error.name} is not installed", remedy) from None

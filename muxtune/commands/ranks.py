"""``muxtune train`` on several ranks: one process a GPU, all of one command line.

Rank 0 does what the command does anywhere; the others follow it. Ranks are started by torchrun,
or by the command itself on one host.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from muxtune import build
from muxtune.config import CommonConfig, CostConfig, TrainConfig
from muxtune.cost.schema import load_profile
from muxtune.cost.shipped import profile_path
from muxtune.errors import ConfigError, MuxTuneError
from muxtune.report.run_folder import provenance

DEFAULT_TIMEOUT_S = 30.0
TIMEOUT = "rank_timeout_s"


class Crew(NamedTuple):
    """What rank 0 needs to drive the others. ``close`` lets them go."""

    store: Any
    make_instance: Callable[..., Any]
    close: Callable[[], None]


def num_ranks(config: CommonConfig) -> int:
    """Of the one instance that spans them all; 1 where the run needs one process."""
    return build.instance_gpus(config.cluster)


def timeout_s(config: TrainConfig) -> float:
    """Raises ConfigError for what is no positive number."""
    value = config.backend.get(TIMEOUT, DEFAULT_TIMEOUT_S)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"backend.{TIMEOUT}", f"is {value!r}", "Give seconds above 0")
    return float(value)


def rank_info(config: CommonConfig) -> Any:
    """This process's place among ranks, or None. Raises ConfigError for a wrong world size."""
    from muxtune.runtime.distributed.launch import RankInfo

    info = RankInfo.from_environment()
    if info is not None:
        check(config, info.world_size)
    return info


def check(config: CommonConfig, world_size: int) -> None:
    """Raises ConfigError where the model or the processes do not fit the layout."""
    from muxtune.runtime.distributed.layout import Layout

    cluster = config.cluster
    build.check_cluster(cluster)
    build.check_dealing(config)
    if cluster.num_gpus != num_ranks(config) or cluster.instances_per_gpu != 1:
        raise ConfigError(
            "cluster.num_gpus",
            f"is {cluster.num_gpus}, but the real executor runs one instance, of "
            f"{num_ranks(config)} ranks",
            "Make them equal, with instances_per_gpu=1",
        )
    Layout(build.replicas_of(cluster)).check(build.shape_of(config.model), world_size)
    _check_step(config)
    # Streams share no queue of a GPU: one that waits for another rank holds no other up.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if num_ranks(config) > 1 and build.where_to_compute(config)[0].type == "cuda":
        _check_gpus(config)


def _check_step(config: CommonConfig) -> None:
    from muxtune.runtime.options import STEPS

    step = getattr(config, "backend", {}).get("step", STEPS[0])
    if step not in STEPS:
        problem = f"'{step}' is no way to compute a step"
        raise ConfigError("backend.step", problem, f"Choose one of: {', '.join(STEPS)}")


def _check_gpus(config: CommonConfig) -> None:
    """A GPU for each rank on this host. Does not touch them: ranks are forked later."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks(config)))
    if torch.cuda.device_count() < here:
        problem = f"{here} ranks of this host need a GPU each, but torch sees "
        remedy = "Give fewer ranks, other hosts (torchrun), or backend.device=cpu"
        raise ConfigError("cluster.num_gpus", f"{problem}{torch.cuda.device_count()}", remedy)


def controller_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the backend: rank 0's executor leaves it to the ranks how they compute a step."""
    return {**options, "step": "eager"}


def planner_options(config: CommonConfig) -> dict[str, Any]:
    """Of the planner: ranks carry out rounds across their bounds only where an order names their
    micro-batches, so plans are chosen that have one."""
    known = {"rounds_overlap": False} if config.planner.get("name") == "muxtune" else {}
    return {**(known if num_ranks(config) > 1 else {}), **config.planner}


def captures(options: Mapping[str, Any], device: Any) -> bool:
    """Whether ranks run rounds as captured stages where a plan lets them; ``auto`` on GPUs. Where
    it does not, the run says why."""
    step = options.get("step", "auto")
    return step == "captured" or (step == "auto" and device.type == "cuda")


def join_crew(config: TrainConfig, info: Any) -> tuple[Any, Any, Any]:
    """Meet the other ranks, and take this rank's part of the model: (worker, watch, store).

    Raises ConfigError or DistributedError, on every rank.
    """
    from muxtune.runtime.distributed.launch import Watch, agree, connect
    from muxtune.runtime.distributed.layout import Layout
    from muxtune.runtime.distributed.links import Patience
    from muxtune.runtime.distributed.sharding import StageBackbone, weights_digest
    from muxtune.runtime.distributed.team import Team
    from muxtune.runtime.distributed.worker import Worker

    layout = Layout(build.replicas_of(config.cluster))
    limit_s = timeout_s(config)
    _share_cores(info.world_size)
    connect(info, limit_s)
    agree(info, facts_of(config))
    watch = Watch(info, limit_s)
    place = layout.places[info.rank]
    store = build.backbone_store(config)
    if store.device.type == "cuda":
        store.device = own_gpu(info)
    weights: dict[str, str] = {}

    def make(name: str, model: Any, tokenizer: Any, device: Any, dtype: Any) -> StageBackbone:
        weights[f"weights of {name}"] = weights_digest(model)
        return StageBackbone(name, model, tokenizer, layout, place, device, dtype)

    store.make = make
    backbone: Any = store.get(config.model.name)
    team = Team(info.rank, info.world_size)
    agree(info, weights, team.control)  # who reads them faster waits for the others
    patience = Patience(limit_s, watch.is_controller_idle)
    deterministic = bool(config.backend.get("deterministic", True))
    as_graphs = captures(config.backend, store.device)
    worker = Worker(backbone, team, patience, deterministic, traces=True, captures=as_graphs)
    return worker, watch, store


def own_gpu(info: Any) -> Any:
    """This rank's, which is also torch's current one from here on."""
    import torch

    device = torch.device("cuda", info.local_rank)
    torch.cuda.set_device(device)
    return device


def _share_cores(num_ranks: int) -> None:
    """Ranks on one host would otherwise each use all of its cores, and wait for each other."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))


def crew_of(config: TrainConfig, info: Any) -> Crew:
    """Of rank 0."""
    from muxtune.runtime.distributed.instance import distributed_factory
    from muxtune.runtime.distributed.team import Stop

    worker, watch, store = join_crew(config, info)

    def close() -> None:
        worker.team.tell(Stop())
        watch.close()

    watch.idle(True)
    make = distributed_factory(
        worker.team, worker, worker.runner.patience, lambda works: watch.idle(not works)
    )
    return Crew(store, make, close)


def is_follower() -> bool:
    """Whether this process is a rank that another one controls."""
    return os.environ.get("RANK", "0") not in ("", "0") and "WORLD_SIZE" in os.environ


def follow(config: TrainConfig) -> None:
    """What a rank other than 0 does, from the first to the last. Does not return."""
    from muxtune.runtime.distributed.launch import leave

    try:
        info = rank_info(config)
        worker, watch, _ = join_crew(config, info)
        worker.serve()
        watch.close()
    except MuxTuneError as error:
        print(f"error: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        leave(2)
    leave(0)


def facts_of(config: TrainConfig) -> dict[str, str]:
    """What must be the same on all ranks."""
    here = provenance(config.seed)
    versions = {
        **here["packages"],
        "python": here["python"].rpartition(".")[0],
        "muxtune": f"{here['muxtune']}, commit {here['git_commit']}",
    }
    facts = {f"version of {name}": str(value) for name, value in versions.items()}
    facts["cost.path"] = _profile_hash(config.cost)
    for name in ("model", "cluster", "backend", "seed"):
        value = getattr(config, name)
        plain = asdict(value) if hasattr(value, "__dataclass_fields__") else value
        facts |= _leaves(name, plain)
    return facts


def _leaves(name: str, value: Any) -> dict[str, str]:
    """Each setting by its whole name, so that the one that differs can be named."""
    if not isinstance(value, Mapping):
        return {name: json.dumps(value, default=str)}
    leaves: dict[str, str] = {}
    for key, below in value.items():
        leaves |= _leaves(f"{name}.{key}", below)
    return leaves


def _profile_hash(cost: CostConfig) -> str:
    if cost.kind != "profile":
        return cost.kind
    return load_profile(profile_path(cost.path)).content_hash

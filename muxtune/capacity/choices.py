"""Policies to compare: what each of them sets, in the words of ``muxtune simulate``.

A name is an option of the group ``planner`` (a file of ``conf/planner``, or a package's entry
point), which brings its cluster policy and its way of executing along. Anything else is written
out: ``{name: colocated, settings: [planner=exclusive, cluster_policy=fifo_colocated, ...]}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from muxtune.config import conf_dir, register_schemas
from muxtune.errors import ConfigError

FIELD = "policies"
EVERY = "all"


class PolicyChoice(NamedTuple):
    """What a policy decides. ``cost``: how its system executes, fields of ``CostConfig``."""

    name: str
    planner: Mapping[str, Any]
    cluster_policy: Mapping[str, Any]
    cost: Mapping[str, Any]
    tp: int
    pp: int
    instances_per_gpu: Any


def policy_choices(policies: Sequence[Any], baseline: str) -> list[PolicyChoice]:
    """In the order given, the baseline among them. Raises ConfigError for names that do not exist,
    settings that do not go together and names given twice."""
    from hydra import compose

    register_schemas()
    with _hydra():
        wanted = [_named(item) for item in policies]
        if [name for name, _ in wanted] == [EVERY]:
            wanted = [(name, [f"planner={name}"]) for name in planner_names()]
        names = [name for name, _ in wanted]
        if len(set(names)) != len(names) or not names:
            remedy = "Give each policy once, under a name of its own"
            raise ConfigError(FIELD, f"are {', '.join(names) or 'none'}", remedy)
        if baseline not in names:
            wanted.insert(0, (baseline, [f"planner={baseline}"]))
        return [_choice(name, settings, compose) for name, settings in wanted]


@contextmanager
def _hydra() -> Iterator[None]:
    """A Hydra to compose with, also inside of a job of another one."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def planner_names() -> list[str]:
    """Options of the group ``planner``; needs an initialised Hydra."""
    from hydra.core.global_hydra import GlobalHydra

    found = GlobalHydra.instance().config_loader().get_group_options("planner")
    return sorted(name for name in found if not name.startswith("base_"))


def _named(item: Any) -> tuple[str, list[str]]:
    if isinstance(item, str):
        return item, [f"planner={item}"]
    if isinstance(item, Mapping) and set(item) == {"name", "settings"}:
        return str(item["name"]), [str(setting) for setting in item["settings"]]
    remedy = "Give names, or mappings with name and settings: [planner=NAME, ...]"
    raise ConfigError(FIELD, f"{item!r} is no policy", remedy)


def _choice(name: str, settings: list[str], compose: Any) -> PolicyChoice:
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = compose("simulate", overrides=[*settings, "output_dir=unused"])
        cluster = config.cluster
        content: Any = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        known = ", ".join(planner_names())
        reason = str(error).strip().splitlines()[0]
        problem = f"'{name}' cannot be composed ({reason})"
        raise ConfigError(FIELD, problem, f"Options of planner are: {known}") from None
    cost = {field: content["cost"][field] for field in content["cost"] if field not in _MACHINE}
    return PolicyChoice(
        name,
        content["planner"],
        content["cluster_policy"],
        cost,
        cluster.tp,
        cluster.pp,
        cluster.instances_per_gpu,
    )


_MACHINE = ("kind", "path")  # of the cost model, not of a policy

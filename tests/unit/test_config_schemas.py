"""Every group composes with every command, and wrong keys and types are caught by the schemas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from muxtune import config as schemas
from muxtune.cli import COMMANDS
from muxtune.config import COMMANDS as CONFIGURED
from muxtune.config import OPEN_GROUPS, conf_dir, register_schemas
from muxtune.registry import CLUSTER_POLICIES, PLANNERS

GROUPS = [path for path in conf_dir().iterdir() if path.is_dir() and path.name != "experiment"]
# What a command must be told, because it has no useful default.
REQUIRED = {
    "workload=trace": ["workload.trace=t.csv"],
    "cost=profile": ["cost.path=p.json"],
    "model=folder": ["model.name=m"],
}


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def composed(command: str, *overrides: str) -> Any:
    content = compose(command, overrides=list(overrides))
    return OmegaConf.to_object(content)


def options(group: Path) -> list[str]:
    return sorted(path.stem for path in group.glob("*.yaml"))


def test_the_commands_of_the_command_line_have_configurations():
    assert set(CONFIGURED) == set(COMMANDS) - {"report", "export"}
    assert all((conf_dir() / f"{command}.yaml").is_file() for command in CONFIGURED)


@pytest.mark.parametrize("command", CONFIGURED)
def test_defaults_compose_into_their_schema(command: str):
    found = composed(command)
    assert type(found).__name__ == f"{command.capitalize()}Config"
    assert found.command == command
    assert found.output_dir.startswith(f"outputs/{command}/")


@pytest.mark.parametrize(
    "choice",
    [f"{group.name}={name}" for group in GROUPS for name in options(group)],
)
@pytest.mark.parametrize("command", ["simulate", "compare"])
def test_every_option_of_every_group_composes(command: str, choice: str):
    if choice == "cost=same":
        pytest.skip("an option of simulator_cost")
    composed(command, choice, *REQUIRED.get(choice, ()))


def test_the_simulator_can_have_costs_of_its_own():
    found = composed("simulate", "cost@simulator_cost=profile", "simulator_cost.path=p.json")
    assert (found.cost.kind, found.simulator_cost.kind) == ("analytic", "profile")


def test_there_is_an_option_for_every_registered_policy():
    known = {"planner": PLANNERS.names(), "cluster_policy": CLUSTER_POLICIES.names()}
    for group, names in known.items():
        files = set(options(conf_dir() / group))
        assert files <= set(names)
        for name in names:
            found = composed("simulate", f"{group}={name}")
            assert getattr(found, group)["name"] == name


def test_exclusive_brings_its_placement_and_eager_costs():
    found = composed("simulate", "planner=exclusive")
    assert found.cluster_policy["name"] == "fifo_exclusive" and found.cost.style == "eager"
    other = composed("simulate", "planner=exclusive", "cluster_policy=fifo_colocated")
    assert other.cluster_policy["name"] == "fifo_colocated"
    graph = composed("simulate", "planner=exclusive", "cost.style=graph")
    assert graph.cost.style == "graph"


@pytest.mark.parametrize("group", OPEN_GROUPS)
def test_policies_and_backends_take_options_that_no_schema_names(group: str):
    found = composed("simulate", f"{group}.some_option=3")
    assert getattr(found, group)["some_option"] == 3


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("sed=1", "sed"),
        ("workload.lod=1", "lod"),
        ("cluster.num_gpu=3", "num_gpu"),
        ("workload.load=abc", "abc"),
        ("cluster.num_gpus=two", "two"),
        ("planner=nothing", "nothing"),
    ],
)
def test_wrong_keys_and_types_are_refused(override: str, problem: str):
    with pytest.raises(Exception, match=problem):
        composed("simulate", override)


def test_schemas_are_not_frozen():
    """Hydra fails on frozen dataclasses as group schemas."""
    for _, _, schema in schemas._GROUP_SCHEMAS:
        assert not schema.__dataclass_params__.frozen


def test_no_configuration_names_code_but_the_sweep_callback():
    lines = [
        line.strip()
        for path in conf_dir().rglob("*.yaml")
        for line in path.read_text().splitlines()
        if "_target_" in line
    ]
    assert lines == ["_target_: muxtune.report.sweep_callback.SweepCallback"]


def test_seeds_of_workloads_follow_the_seed():
    for workload in ("philly", "poisson"):
        found = composed("simulate", f"workload={workload}", "seed=5")
        assert found.seed == found.workload.seed == 5

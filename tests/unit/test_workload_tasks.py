"""Task files: what they mean, and what is said about every bad value."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.errors import ConfigError
from muxtune.types import NS_PER_S, AdapterSpec, DataSpec, OptimizerSpec, TaskSpec
from muxtune.workload.tasks import (
    RESERVED_IDS,
    check_id,
    check_targets,
    load_tasks,
    tasks_from_mapping,
    with_model_targets,
)

GOOD = {"id": "a", "model": "tiny", "data": "a.jsonl", "steps": 10}


def one(**changes) -> TaskSpec:
    declaration = {key: item for key, item in {**GOOD, **changes}.items() if item is not ...}
    return tasks_from_mapping({"tasks": [declaration]}, source="t.yaml")[0]


def test_all_fields_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(
        """
defaults: {model: tiny, lr: 1e-3, steps: 5, batch_size: 2}
tasks:
  - id: first
    tenant: acme
    rank: 4
    alpha: 12
    dropout: 0.1
    targets: [q_proj, down_proj]
    data: sub/a.jsonl
    format: text
    max_length: 64
    validation_share: 0.2
    accumulation: 3
    schedule: cosine
    warmup_steps: 2
    weight_decay: 0.01
    max_grad_norm: 0
    beta1: 0.8
    seed: 7
    arrival_s: 1.5
    deadline_s: 60
    cancel_s: 30
    priority: -2
    max_slowdown: 2
  - {id: second, data: b.txt, epochs: 1.5, rank: 4}
""",
        encoding="utf-8",
    )
    first, second = load_tasks(path)
    assert first == TaskSpec(
        task_id="first",
        model="tiny",
        tenant="acme",
        adapter=AdapterSpec("lora", 4, 12.0, 0.1, ("q_proj", "down_proj"), {}),
        data=DataSpec(str(tmp_path / "sub" / "a.jsonl"), "text", 64, 0.2),
        optimizer=OptimizerSpec(1e-3, "cosine", 2, 0.01, 0.0, 0.8),
        batch_size=2,
        accumulation=3,
        num_steps=5,
        seed=7,
        arrival_ns=3 * NS_PER_S // 2,
        priority=-2,
        deadline_ns=60 * NS_PER_S,
        max_slowdown=2.0,
        cancel_ns=30 * NS_PER_S,
    )
    assert (second.num_steps, second.epochs) == (None, 1.5)  # its own choice replaces the default
    assert second.adapter.alpha == 8.0  # twice the rank
    assert second.optimizer.lr == 1e-3


def test_absolute_data_path_stays() -> None:
    absolute = str(Path.cwd() / "a.jsonl")
    assert one(data=absolute).data.path == absolute


def test_synthetic_task_replaces_default_data() -> None:
    content = {
        "defaults": {**GOOD, "id": ...},
        "tasks": [{"id": "a", "histogram": "sst2", "tokenizer": "llama2-32k"}],
    }
    del content["defaults"]["id"]
    task = tasks_from_mapping(content)[0]
    assert (task.data.path, task.data.histogram) == ("", "sst2")


def test_hydra_config_is_a_mapping_too() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    content = {"defaults": {"model": "tiny"}, "tasks": [{**GOOD, "targets": ["q_proj"]}]}
    assert tasks_from_mapping(omegaconf.OmegaConf.create(content)) == tasks_from_mapping(content)


BAD_VALUES = [
    ("rank", 0),
    ("rank", 2.5),
    ("rank", True),
    ("rank", None),
    ("alpha", -1),
    ("alpha", "much"),
    ("dropout", 1),
    ("dropout", -0.1),
    ("targets", []),
    ("targets", ["q_proj", "q_proj"]),
    ("targets", ["q_proj", "all-linear"]),
    ("targets", 3),
    ("method", "lorra"),
    ("options", {"surprise": 1}),
    ("options", "surprise"),
    ("format", "csv"),
    ("data", ""),
    ("batch_size", 0),
    ("accumulation", 0),
    ("max_length", 1),
    ("steps", 0),
    ("steps", -3),
    ("lr", -1e-3),
    ("lr", 0),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("lr", "fast"),
    ("schedule", "cosin"),
    ("warmup_steps", -1),
    ("warmup_steps", 11),
    ("weight_decay", -0.1),
    ("max_grad_norm", -1),
    ("beta2", 1.0),
    ("eps", 0),
    ("seed", -1),
    ("validation_share", 0.95),
    ("validation_share", -0.1),
    ("arrival_s", -1),
    ("priority", "high"),
    ("max_slowdown", 0.5),
    ("max_slowdown", float("nan")),
    ("cancel_s", -1),
    ("tenant", ""),
    ("model", None),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_bad_value_names_file_task_field_and_remedy(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        one(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"t.yaml: task 'a': {field}")
    assert message.partition(". ")[2], message
    assert value is None or str(value) in message or repr(value) in message or field == "options"


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'lorra' does not exist. Did you mean 'lora'\?.* lora"):
        one(method="lorra")
    with pytest.raises(ConfigError, match=r"Say bottleneck with targets: \[o_proj, down_proj\]\."):
        one(method="houlsby")


def test_unknown_field_suggests_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"task 'a': rnak: .*Did you mean 'rank'\?"):
        one(rnak=3)
    with pytest.raises(ConfigError, match=r"defaults: stepz: .*Did you mean 'steps'\?"):
        tasks_from_mapping({"defaults": {"stepz": 1}, "tasks": [GOOD]})
    with pytest.raises(ConfigError, match="defaults: id"):
        tasks_from_mapping({"defaults": {"id": "x"}, "tasks": [GOOD]})
    with pytest.raises(ConfigError, match=r"taskz: .*Did you mean 'tasks'"):
        tasks_from_mapping({"taskz": [GOOD]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": ...}, "steps, epochs: neither"),
        ({"epochs": 2}, "steps, epochs: both"),
        ({"data": ...}, "data, histogram: neither"),
        ({"histogram": "sst2"}, "data, histogram: both"),
        ({"model": ...}, "model: is missing"),
        ({"arrival_s": 10, "deadline_s": 9}, "deadline_s: 9 is before the task's arrival_s 10"),
        ({"arrival_s": 10, "cancel_s": 9}, "cancel_s: 9 is before the task's arrival_s 10"),
        ({"steps": ..., "epochs": 0}, "epochs: 0 is out of range"),
    ],
)
def test_fields_that_do_not_fit_together(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        one(**changes)
    assert f"t.yaml: task 'a': {words}" in str(caught.value)


@pytest.mark.parametrize(
    "task_id", ["a.b", "", "a/b", "..", "-a", "_a", "a b", "é", "a" * 101, None, True, 1.5, ["a"]]
)
def test_ids_that_peft_or_a_folder_cannot_take(task_id: object) -> None:
    with pytest.raises(ConfigError, match="task 1: id"):
        one(id=task_id)


def test_dot_in_id_says_why() -> None:
    with pytest.raises(ConfigError, match=r"'llama-3\.1'.*PEFT takes no name with a dot.*Use 1 to"):
        one(id="llama-3.1")


def test_missing_id_and_duplicates() -> None:
    with pytest.raises(ConfigError, match="task 2: id: is missing"):
        tasks_from_mapping({"tasks": [GOOD, {"model": "tiny"}]})
    with pytest.raises(ConfigError, match="task id 'a' is given twice"):
        tasks_from_mapping({"tasks": [GOOD, GOOD]})
    with pytest.raises(ConfigError, match="'A' is given beside 'a'"):
        tasks_from_mapping({"tasks": [GOOD, {**GOOD, "id": "A"}]})


def test_numeric_id_is_text() -> None:
    assert one(id=7).task_id == "7"


def test_reserved_ids_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    containers = (torch.nn.ModuleDict(), torch.nn.ParameterDict())
    names = {name for box in containers for name in dir(box) if not name.startswith("_")}
    assert names <= RESERVED_IDS
    with pytest.raises(KeyError):
        containers[0]["train"] = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"'train' cannot be a task id.*'train-1'"):
        one(id="train")


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,30}", fullmatch=True))
def test_accepted_ids_are_their_own_folder(task_id: str) -> None:
    if task_id not in RESERVED_IDS:
        assert Path("root", check_id(task_id, "x")).parent == Path("root")


@given(st.text(max_size=12))
def test_any_text_is_a_safe_id_or_a_config_error(text: str) -> None:
    try:
        accepted = check_id(text, "x")
    except ConfigError:
        return
    assert accepted == text and not set(text) & set("./\\: \n\0")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tasks: [", "is not valid YAML"),
        ("tasks: [{id: a, id: b}]", "'id' is given twice"),
        ("", "found nothing"),
        ("- a", "found a list"),
        ("tasks: {}", "there is no task"),
        ("tasks: []", "there is no task"),
        ("tasks: [a]", "task 1: expected fields with values, found a str"),
        ("defaults: 3\ntasks: [{id: a}]", "defaults: expected fields"),
    ],
)
def test_files_that_are_no_task_files(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_tasks(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tasks(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"tasks: [{id: a, tenant: caf\xe9}]")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_tasks(path)


MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q", "k_proj")]


def test_targets_are_checked_against_the_model() -> None:
    assert check_targets(one(targets=["k_proj"]), MODULES) == ("k_proj",)
    assert check_targets(one(targets=["layers.1.self_attn.q"]), MODULES) == (
        "layers.1.self_attn.q",
    )
    assert with_model_targets(one(targets="all-linear"), MODULES).adapter.targets == ("k_proj", "q")


@pytest.mark.parametrize("target", ["k_prj", "proj", "self_attn", "v_proj"])
def test_target_that_matches_no_module(target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_targets(one(targets=[target]), MODULES)
    message = str(caught.value)
    assert f"task 'a': targets: model 'tiny' has no linear module '{target}'" in message
    assert "k_proj, q" in message


def test_a_target_of_one_block_is_refused_where_blocks_are_alike() -> None:
    with pytest.raises(ConfigError, match="is of one block, and a target is adapted"):
        check_targets(one(targets=["layers.1.self_attn.q"]), ["self_attn.q", "self_attn.k_proj"])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_methods_of_virtual_tokens_take_the_rank_and_no_targets(method: str) -> None:
    (task,) = tasks_from_mapping(
        {
            "defaults": {"targets": ["q_proj"], "steps": 1, "model": "m", "data": "a.jsonl"},
            "tasks": [{"id": "a", "method": method, "rank": 20}],
        }
    )
    assert (task.adapter.rank, task.adapter.targets) == (20, ())
    with pytest.raises(ConfigError, match=f"targets: are given, but {method} adapts no linear"):
        one(method=method, targets=["q_proj"])

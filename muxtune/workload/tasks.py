"""Task declarations: YAML or a mapping to checked ``TaskSpec``s.

    defaults:                # optional; any field but id; a task's own value wins
      model: smollm2-135m
      targets: [q_proj, v_proj]
    tasks:
      - id: bard             # letters, digits, - and _
        data: shakespeare.jsonl          # relative to this file
        format: auto         # auto | text | prompt_completion | messages | plain
        rank: 16             # alpha, if not given, is twice the rank
        batch_size: 4        # sequences; times accumulation is one optimizer step
        max_length: 128      # tokens
        steps: 25            # or epochs: 1.5
        lr: 1e-3

``defaults`` may say ``steps`` while a task says ``epochs`` (or data and histogram): the task's
own choice replaces the other one. Times are seconds since the start of the run. A task with
``histogram`` (and optionally ``tokenizer``) instead of ``data`` has drawn lengths, no text.
Everything that can be known without the model is checked here, before any work starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from muxtune.errors import ConfigError
from muxtune.types import NS_PER_S, AdapterSpec, DataSpec, OptimizerSpec, TaskSpec
from muxtune.workload import methods
from muxtune.workload.fields import (
    Field,
    as_mapping,
    check_keys,
    closest,
    one_of,
    optional,
    to_float,
    to_int,
    to_names,
    to_text,
)

ALL_LINEAR = "all-linear"
FORMATS = ("auto", "text", "prompt_completion", "messages", "plain")
SCHEDULES = ("constant", "linear", "cosine")
MAX_VALIDATION_SHARE = 0.9

# An adapter's name becomes a folder, and a key of torch's ModuleDict and ParameterDict, which
# refuse the names of their own attributes (transformers adds smart_apply to torch's modules).
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_TORCH_NAMES = """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile copy cpu
    cuda double dump_patches eval extra_repr float forward fromkeys get get_buffer get_extra_state
    get_parameter get_submodule half ipu items keys load_state_dict modules mtia named_buffers
    named_children named_modules named_parameters parameters pop popitem register_backward_hook
    register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
    set_submodule setdefault share_memory smart_apply state_dict to to_empty train training type
    update values xpu zero_grad
"""
RESERVED_IDS = frozenset(_TORCH_NAMES.split())


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda value: value is None or value >= low


def _choice(names: tuple[str, ...]) -> Field:
    return Field(one_of(names), "a known name", remedy=f"Choose one of: {', '.join(names)}")


_COUNT = Field(to_int, "a whole number", _at_least(1), "Give a whole number of at least 1")
_LENGTH = Field(to_int, "a whole number", _at_least(2), "Give at least 2 tokens")
_WHOLE = Field(to_int, "a whole number", _at_least(0), "Give a whole number of at least 0")
_POSITIVE = Field(to_float, "a number", lambda value: value > 0, "Give a number above 0")
_NOT_NEGATIVE = Field(to_float, "a number", _at_least(0), "Give a number of at least 0")
_CLOCK = "Give seconds since the start of the run"
_SECONDS = Field(optional(to_float), "a number", _at_least(0), _CLOCK)
_SHARE = Field(to_float, "a number", lambda value: 0 <= value < 1, "Give a number in [0, 1)")
_NAME = Field(to_text, "a name")

_FIELDS: dict[str, Field] = {
    "id": Field(lambda value: value, "a name"),  # checked by check_id
    "tenant": _NAME,
    "model": _NAME,
    "method": _NAME,  # checked against METHODS
    "rank": _COUNT,
    "alpha": _POSITIVE,
    "dropout": _SHARE,
    "targets": Field(
        to_names,
        "a list of distinct module names",
        remedy=f"List name suffixes such as [q_proj, v_proj], or say {ALL_LINEAR}",
    ),
    "options": Field(lambda value: dict(value or {}), "a mapping of options"),
    "data": _NAME,
    "format": _choice(FORMATS),
    "histogram": _NAME,
    "tokenizer": _NAME,
    "batch_size": _COUNT,
    "accumulation": _COUNT,
    "max_length": _LENGTH,
    "steps": Field(
        optional(to_int), "a whole number", _at_least(1), "Give a whole number of at least 1"
    ),
    "epochs": Field(
        optional(to_float),
        "a number",
        lambda value: value is None or value > 0,
        "Give a number above 0",
    ),
    "lr": _POSITIVE,
    "schedule": _choice(SCHEDULES),
    "warmup_steps": _WHOLE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": Field(to_float, "a number", _at_least(0), "Give a norm, or 0 for no clipping"),
    "beta1": _SHARE,
    "beta2": _SHARE,
    "eps": _POSITIVE,
    "seed": _WHOLE,
    "validation_share": Field(
        to_float,
        "a number",
        lambda value: 0 <= value <= MAX_VALIDATION_SHARE,
        f"Give the share of documents to hold out, from 0 to {MAX_VALIDATION_SHARE}",
    ),
    "arrival_s": Field(to_float, "a number", _at_least(0), _CLOCK),
    "priority": Field(to_int, "a whole number", remedy="Give a whole number; larger is sooner"),
    "deadline_s": _SECONDS,
    "max_slowdown": Field(
        optional(to_float),
        "a number",
        _at_least(1),
        "Give how many times slower than alone the task may run: 1 or more",
    ),
    "cancel_s": _SECONDS,
}
_EITHER_OR = (("steps", "epochs"), ("data", "histogram"))
_NO_FOLDER = Path()


# ---------------------------------------------------------------------------------- entry points


def load_tasks(path: str | Path) -> list[TaskSpec]:
    """Tasks of a YAML file; data paths are taken relative to the file's folder.

    Raises ConfigError that names file, task, field, value and remedy.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text("utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        remedy = "Give the path of a YAML file with a 'tasks' list"
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", remedy) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), "is not UTF-8 text", "Save it as UTF-8") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(str(path), f"is not valid YAML: {problem}", "Correct it") from None
    return tasks_from_mapping(content, source=str(path), folder=path.parent)


def tasks_from_mapping(
    content: Any, *, source: str = "tasks", folder: str | Path = _NO_FOLDER
) -> list[TaskSpec]:
    """Tasks of ``{"defaults": {...}, "tasks": [...]}``, as in a task file or a Hydra config.

    ``source`` names the origin in errors; ``folder`` is where relative data paths start.
    """
    remedy = "Write a 'tasks' list with at least one task, and optionally 'defaults'"
    content = as_mapping(source, _plain(content), remedy)
    check_keys(source, content, ("tasks", "defaults"))
    defaults = as_mapping(f"{source}: defaults", content.get("defaults") or {}, remedy)
    check_keys(f"{source}: defaults", defaults, set(_FIELDS) - {"id"})
    declared = content.get("tasks")
    if not isinstance(declared, list) or not declared:
        raise ConfigError(f"{source}: tasks", "there is no task", remedy)
    tasks = [
        _task(number, declaration, defaults, source, Path(folder))
        for number, declaration in enumerate(declared, start=1)
    ]
    check_unique([task.task_id for task in tasks], f"{source}: id")
    return tasks


def check_id(task_id: Any, where: str) -> str:
    """The id as text. It names the adapter in PEFT and the folder that the adapter is saved in.

    Raises ConfigError for what either of them cannot take.
    """
    text = str(task_id) if isinstance(task_id, (str, int)) else ""
    remedy = "Use 1 to 100 letters, digits, '-' and '_', starting with a letter or digit"
    if not _ID.fullmatch(text) or isinstance(task_id, bool):
        why = "PEFT takes no name with a dot" if "." in text else "it is not a safe folder name"
        raise ConfigError(where, f"{task_id!r} cannot be a task id: {why}", remedy)
    if text in RESERVED_IDS:
        problem = f"{task_id!r} cannot be a task id: torch modules use this name themselves"
        raise ConfigError(where, problem, f"Choose another, such as '{text}-1'")
    return text


def check_unique(task_ids: Iterable[str], where: str) -> None:
    """Raises ConfigError for two ids that are one folder, also where letter case is ignored."""
    seen: dict[str, str] = {}
    for task_id in task_ids:
        other = seen.get(task_id.casefold())
        seen[task_id.casefold()] = task_id
        if other is not None:
            same = "twice" if other == task_id else f"beside '{other}', differing only in case"
            raise ConfigError(where, f"task id '{task_id}' is given {same}", "Rename one of them")


def check_targets(task: TaskSpec, module_names: Collection[str]) -> tuple[str, ...]:
    """The task's targets as they are in the model; ``all-linear`` becomes the names themselves.

    ``module_names``: dotted names of the model's linear modules without the output layer. As in
    PEFT, a target matches a module of that name or one whose name ends in ``.target``.
    Raises ConfigError for a target that matches no module, listing those that exist.
    """
    suffixes = sorted({name.rpartition(".")[2] for name in module_names})
    if task.adapter.targets == (ALL_LINEAR,):
        return tuple(suffixes)
    for target in task.adapter.targets:
        if not any(name == target or name.endswith(f".{target}") for name in module_names):
            *path, leaf = target.split(".")
            of_one_block = leaf in suffixes and any(part.isdigit() for part in path)
            raise ConfigError(
                f"task '{task.task_id}': targets",
                f"'{target}' is of one block, and a target is adapted in every block"
                if of_one_block
                else f"model '{task.model}' has no linear module '{target}'",
                f"{closest(target, suffixes)}Choose from: {', '.join(suffixes)}, or {ALL_LINEAR}",
            )
    return task.adapter.targets


def with_model_targets(task: TaskSpec, module_names: Collection[str]) -> TaskSpec:
    """The task with its targets checked and ``all-linear`` spelt out."""
    targets = check_targets(task, module_names)
    return task._replace(adapter=task.adapter._replace(targets=targets))


# ------------------------------------------------------------------------------------- one task


def _task(
    number: int, declaration: Any, defaults: Mapping[str, Any], source: str, folder: Path
) -> TaskSpec:
    where = f"{source}: task {number}"
    declaration = as_mapping(where, declaration, "Write 'id:' and the task's other fields")
    if "id" not in declaration:
        raise ConfigError(f"{where}: id", "is missing", "Give every task an id of its own")
    where = f"{source}: task '{check_id(declaration['id'], f'{where}: id')}'"
    check_keys(where, declaration, _FIELDS)
    given = _merge(defaults, declaration)
    values = {key: _FIELDS[key].read(f"{where}: {key}", item) for key, item in given.items()}
    _check_together(where, values)
    if declaration.get("targets") and values.get("method") in methods.WITHOUT_TARGETS:
        problem = f"are given, but {values['method']} adapts no linear"
        raise ConfigError(f"{where}: targets", problem, "Leave them out")
    return _spec(values, folder)


def _merge(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for pair in _EITHER_OR:
        if any(own.get(key) is not None for key in pair):
            for key in pair:
                merged.pop(key, None)
    merged.update(own)
    return merged


def _check_together(where: str, values: Mapping[str, Any]) -> None:
    """What no field can tell on its own."""
    if "model" not in values:
        raise ConfigError(f"{where}: model", "is missing", "Name the base model")
    _check_method(where, values)
    for left, right in _EITHER_OR:
        given = [key for key in (left, right) if values.get(key) is not None]
        if len(given) != 1:
            problem = "both are given" if given else "neither is given"
            raise ConfigError(f"{where}: {left}, {right}", problem, "Give exactly one of the two")
    targets = values.get("targets", ())
    if ALL_LINEAR in targets and len(targets) > 1:
        remedy = f"Say {ALL_LINEAR} alone, or list names only"
        raise ConfigError(f"{where}: targets", f"{list(targets)} mixes both", remedy)
    _check_warmup(where, values)
    for key in ("deadline_s", "cancel_s"):
        value, arrival_s = values.get(key), values.get("arrival_s", 0.0)
        if value is not None and value < arrival_s:
            problem = f"{value:g} is before the task's arrival_s {arrival_s:g}"
            raise ConfigError(f"{where}: {key}", problem, "Give a later time, or leave it out")


def _check_method(where: str, values: Mapping[str, Any]) -> None:
    method = values.get("method", AdapterSpec().method)
    if method not in methods.METHODS:
        known_as = methods.KNOWN_AS.get(method.lower())
        hint = f"Say {known_as}. " if known_as else closest(method, methods.METHODS)
        remedy = f"{hint}Choose one of: {', '.join(methods.METHODS)}"
        raise ConfigError(f"{where}: method", f"'{method}' does not exist", remedy)
    known = methods.METHOD_OPTIONS.get(method, ())
    for option in values.get("options", {}):
        if option not in known:
            remedy = f"Options of {method}: {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}: options: {option}", "does not exist", remedy)


def _check_warmup(where: str, values: Mapping[str, Any]) -> None:
    warmup_steps, steps = values.get("warmup_steps", 0), values.get("steps")
    if steps is not None and warmup_steps > steps:
        problem = f"{warmup_steps} is more than the task's {steps} steps"
        raise ConfigError(f"{where}: warmup_steps", problem, "Give fewer")


def _spec(values: Mapping[str, Any], folder: Path) -> TaskSpec:
    path = str(folder / values["data"]) if "data" in values else ""
    data = DataSpec(path=path, **_renamed(values, _DATA_NAMES))
    times_ns = {
        f"{key}_ns": round(values[f"{key}_s"] * NS_PER_S)
        for key in ("arrival", "deadline", "cancel")
        if values.get(f"{key}_s") is not None
    }
    return TaskSpec(
        task_id=str(values["id"]),
        adapter=_adapter(values),
        data=data,
        optimizer=OptimizerSpec(**_renamed(values, {key: key for key in OptimizerSpec._fields})),
        **_renamed(values, _TASK_NAMES),
        **times_ns,
    )


def _adapter(values: Mapping[str, Any]) -> AdapterSpec:
    adapter = AdapterSpec(**_renamed(values, {key: key for key in AdapterSpec._fields}))
    adapter = adapter._replace(targets=methods.own_targets(adapter.method, adapter.targets))
    return adapter if "alpha" in values else adapter._replace(alpha=2.0 * adapter.rank)


_DATA_NAMES = {
    "format": "format",
    "max_length": "max_length_tokens",
    "validation_share": "validation_share",
    "histogram": "histogram",
    "tokenizer": "tokenizer",
}
_TASK_NAMES = {
    "model": "model",
    "tenant": "tenant",
    "batch_size": "batch_size",
    "accumulation": "accumulation",
    "steps": "num_steps",
    "epochs": "epochs",
    "seed": "seed",
    "priority": "priority",
    "max_slowdown": "max_slowdown",
}


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[key]: item for key, item in values.items() if key in names}


# ------------------------------------------------------------------------------------- plumbing


def _plain(value: Any) -> Any:
    """Plain dicts and lists, whatever mapping type the configuration library uses."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids a key given twice; PyYAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key != "<<":
                if key in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{key}' is given twice", key_node.start_mark
                    )
                keys.add(key)
        return super().construct_mapping(node, deep)

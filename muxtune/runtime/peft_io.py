"""The standard PEFT folder: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from muxtune.errors import DataError
from muxtune.runtime.adapters import adapter_method
from muxtune.runtime.backbone import ALL_LINEAR, Backbone
from muxtune.runtime.bank import adapter_slot
from muxtune.runtime.folders import whole_folder
from muxtune.runtime.tensor_file import write_tensors
from muxtune.types import TaskSpec

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

AdapterParameters = Mapping[str, Mapping[str, Tensor]]  # site name -> parameter name -> weights


def write_adapter(
    folder: Path, task: TaskSpec, parameters: AdapterParameters, backbone: Backbone
) -> Path:
    """A folder that ``PeftModel.from_pretrained`` loads; whole or not at all.

    Raises OutputError when it cannot be written.
    """
    method = adapter_method(task.adapter.method)
    tensors = method.save(parameters)
    with whole_folder(Path(folder)) as partial:
        write_tensors(tensors, partial / WEIGHTS_NAME)
        config = json.dumps(_config(task, backbone), indent=2, sort_keys=True)
        (partial / CONFIG_NAME).write_text(config + "\n", "utf-8")
    return Path(folder)


def read_adapter(folder: Path, task: TaskSpec, backbone: Backbone) -> dict[str, dict[str, Tensor]]:
    """Site name -> parameter name -> weights in pool form. Raises DataError for a bad folder."""
    method, slot = adapter_method(task.adapter.method), adapter_slot(task)
    sites = backbone.sites_of(method.place, task.adapter.targets)
    try:
        tensors = load_file(Path(folder) / WEIGHTS_NAME)
        return method.load(slot, sites, tensors)
    except KeyError as missing:
        remedy = "Name the folder of an adapter with the same targets"
        raise DataError(str(folder), f"holds no tensor {missing}", remedy) from None
    except Exception as error:
        raise DataError(
            str(folder), f"cannot be read ({error})", "Name an adapter folder"
        ) from None


def _config(task: TaskSpec, backbone: Backbone) -> dict[str, object]:
    spec = task.adapter
    if spec.targets == ALL_LINEAR:
        spec = spec._replace(targets=backbone.target_names)
    method = adapter_method(spec.method)
    sites = backbone.sites_of(method.place, spec.targets)
    own = method.peft_config(spec, sites)
    if any(site.fan_in_fan_out for site in sites):
        own["fan_in_fan_out"] = True
    return {
        "base_model_name_or_path": backbone.name,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        **own,
    }

"""A rank's part of the base model, and of the tasks' adapters.

The embedding lies on the first stage, the final norm, the head and the loss on the last; the ranks
of a stage hold both whole and compute them each for itself (about one part in a hundred of a
13B model's work; a cut loss would need exchanges that no plan orders).

A LoRA factor that meets the cut features is cut with them: B of a column-parallel linear, A of a
row-parallel one. The other factor is whole on every rank of the stage; there each rank's gradient
is a part of a sum.

Shape suffixes: D input features, O output features, r rank of an adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from muxtune.cost.shapes import ModelShape, from_hf_config
from muxtune.errors import ConfigError
from muxtune.runtime.backbone import Backbone
from muxtune.runtime.bank import (
    AdapterBank,
    ParameterKey,
    TaskState,
    TaskTensors,
    adapter_slot,
    start_values,
)
from muxtune.runtime.distributed.layout import Cut, Layout, Place, cut_of, layers_of
from muxtune.runtime.linear import LinearSite, module_key
from muxtune.runtime.static_step.model import Unsupported, check_architecture
from muxtune.types import TaskSpec
from muxtune.workload.encoding import Tokenizer

_DIGEST_VALUES = 64  # of each weight, at most
# The magnitude needs the whole weight's norm; virtual tokens are known to no stage's attention.
NOT_SPREAD = ("dora", "prefix", "prompt")


class StageBackbone(Backbone):
    """What one rank holds of a Llama-family model. The model object passed in is cut.

    ``whole_sites``: all adaptable linears of the whole model, with their whole sizes.
    Raises ConfigError for another architecture, or a shape that does not divide.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Tokenizer,
        layout: Layout,
        place: Place,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout, self.place = layout, place
        self.replica = layout.replicas[place.replica]
        self.shape = _checked_shape(name, model, layout)
        self.whole_sites = _whole_sites(model)
        self.layers = layers_of(self.shape, self.replica.pp, place.stage)
        self.cuts = {
            site.name: cut_of(
                site.name, site.in_features, site.out_features, place.part, self.replica.tp
            )
            for site in self.whole_sites.values()
        }
        _keep_stage(model, self.layers, self.is_first, self.is_last)
        if self.replica.tp > 1:
            _cut_linears(model, self.cuts)
        super().__init__(name, model, tokenizer, device, dtype)
        self._place_sites()

    @property
    def is_first(self) -> bool:
        return self.place.stage == 0

    @property
    def is_last(self) -> bool:
        return self.place.stage == self.replica.pp - 1

    @property
    def all_sites(self) -> dict[str, LinearSite]:
        return self.whole_sites

    def check_task(self, task: TaskSpec) -> None:
        """Raises ConfigError for an adapter that cannot be spread over these ranks."""
        method = task.adapter.method
        if method in NOT_SPREAD or (self.replica.tp > 1 and method != "lora"):
            raise ConfigError(
                "adapter.method",
                f"task '{task.task_id}' asks for '{method}', which cannot be spread over "
                f"tp={self.replica.tp} x pp={self.replica.pp} ranks",
                "Use lora; with cluster.tp=1 all methods are possible but " + ", ".join(NOT_SPREAD),
            )

    def _place_sites(self) -> None:
        """A cut input tells which features it holds, so that dropout falls as on the whole."""
        for name, site in self.sites.items():
            cut = self.cuts[name]
            if cut.axis == "in":
                linear = self.model.get_submodule(name)
                linear.base = linear.base._replace(site=site._replace(first_feature=cut.start))
                self.sites[name] = linear.base.site


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Of a few values of every weight of the whole model: other weights have another one."""
    parameters = list(model.named_parameters())
    picked = [p.detach().flatten()[:: p.numel() // _DIGEST_VALUES + 1] for _, p in parameters]
    digest = hashlib.blake2s(torch.cat(picked).float().cpu().numpy().tobytes(), digest_size=8)
    digest.update(repr([(name, tuple(p.shape)) for name, p in parameters]).encode())
    return digest.hexdigest()


def _checked_shape(name: str, model: Any, layout: Layout) -> ModelShape:
    try:
        check_architecture(model)
    except Unsupported as error:
        raise ConfigError("model", str(error), "Choose a Llama-like model, or one GPU") from None
    shape = from_hf_config(model.config, name)
    layout.check(shape, layout.world_size)
    return shape


def _whole_sites(model: Any) -> dict[str, LinearSite]:
    head = model.get_output_embeddings()
    return {
        name: LinearSite(name, module.in_features, module.out_features, module_key(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _keep_stage(model: Any, layers: range, is_first: bool, is_last: bool) -> None:
    """Other stages' modules become empty ones, so that names keep their layer's number."""
    base = model.base_model
    for index in range(len(base.layers)):
        if index not in layers:
            base.layers[index] = nn.Identity()
    if not is_last:
        base.norm = nn.Identity()
        model.lm_head = nn.Identity()
    elif not is_first:
        # A tied head keeps its own reference to the weight.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach(), requires_grad=False)
    if not is_first:
        base.embed_tokens = nn.Identity()


def _cut_linears(model: Any, cuts: Mapping[str, Cut]) -> None:
    for name, cut in cuts.items():
        parent_name, _, last = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = getattr(parent, last)
        except AttributeError:
            continue  # of another stage
        if cut.axis:
            setattr(parent, last, _cut_linear(linear, cut))


def _cut_linear(linear: nn.Linear, cut: Cut) -> nn.Linear:
    rows = slice(cut.start, cut.stop)
    by_output = cut.axis == "out"
    weight_OD = linear.weight.detach()[rows] if by_output else linear.weight.detach()[:, rows]
    bias_O = None if linear.bias is None else linear.bias.detach()
    if bias_O is not None:
        # The sum over ranks must hold a row-parallel linear's bias once.
        bias_O = bias_O[rows] if by_output else (bias_O if cut.start == 0 else None)
    part = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=bias_O is not None, device="meta")
    part.weight = nn.Parameter(weight_OD.contiguous().clone(), requires_grad=False)
    if bias_O is not None:
        part.bias = nn.Parameter(bias_O.clone(), requires_grad=False)
    return part


# ---------------------------------------------------------------------------------- adapters


class WholeTensors(NamedTuple):
    """One parameter of one task, whole and on the CPU: weights and AdamW's two moments."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


Whole = dict[ParameterKey, WholeTensors]


def draw_whole(task: TaskSpec, num_steps: int, backbone: StageBackbone) -> TaskState:
    """A fresh adapter of the whole model on the CPU, as one process draws it."""
    tensors = {}
    for site in backbone.matching_sites(task.adapter.targets):
        for name, value in start_values(task, site, None).items():
            zeros = (torch.zeros_like(value) for _ in range(3))
            tensors[site.name, name] = TaskTensors(value.float(), *zeros)
    return TaskState(task, adapter_slot(task), num_steps, tensors)


def own_part(whole: TaskState, bank: AdapterBank) -> TaskState:
    """This rank's part of a whole adapter, with storage of its own; its gradient is zero."""
    backbone = bank.backbone
    assert isinstance(backbone, StageBackbone)
    tensors = {}
    for (site_name, name), values in whole.tensors.items():
        if site_name not in backbone.sites:
            continue
        columns = backbone.cuts[site_name].of_parameter(name) or slice(None)
        param, exp_avg, exp_avg_sq = (
            tensor[:, columns].to(backbone.device, torch.float32).contiguous().clone()
            for tensor in (values.param, values.exp_avg, values.exp_avg_sq)
        )
        grad = torch.zeros_like(param, dtype=bank.grad_dtype)
        tensors[site_name, name] = TaskTensors(param, grad, exp_avg, exp_avg_sq)
    return TaskState(whole.task, whole.slot, whole.num_steps, tensors, step=whole.step)


class Share(NamedTuple):
    """What one rank contributes to a whole parameter. ``columns``: None for all of them."""

    columns: tuple[int, int] | None
    tensors: WholeTensors


def shares_of(
    state: TaskState, backbone: StageBackbone, weights_only: bool = False
) -> dict[ParameterKey, Share]:
    """Copies on the CPU of what this rank holds. A factor that all ranks of the stage hold comes
    from the first of them. ``weights_only``: the moments have no columns."""
    shares = {}
    for (site_name, name), values in state.tensors.items():
        columns = backbone.cuts[site_name].of_parameter(name)
        if columns is None and backbone.place.part:
            continue
        moments = [t[:, :0] if weights_only else t for t in values[2:]]
        copies = WholeTensors(*(t.detach().to("cpu", copy=True) for t in (values.param, *moments)))
        bounds = None if columns is None else (columns.start, columns.stop)
        shares[site_name, name] = Share(bounds, copies)
    return shares


def put_together(parts: list[dict[ParameterKey, Share]]) -> Whole:
    """The whole parameters from all ranks' shares."""
    by_key: dict[ParameterKey, list[Share]] = {}
    for part in parts:
        for key, share in part.items():
            by_key.setdefault(key, []).append(share)
    whole = {}
    for key, shares in by_key.items():
        ordered = sorted(shares, key=lambda share: share.columns or (0, 0))
        if ordered[0].columns is None:
            whole[key] = ordered[0].tensors
        else:
            kinds = zip(*(share.tensors for share in ordered), strict=True)
            whole[key] = WholeTensors(*(torch.cat(kind, dim=1) for kind in kinds))
    return whole

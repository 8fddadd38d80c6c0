"""Which cost model holds for a base model on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from muxtune.cost.analytic import EAGER as ANALYTIC_EAGER
from muxtune.cost.analytic import AnalyticCostModel, AnalyticOptions
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.composition import ComposedCostModel
from muxtune.cost.devices import DeviceFigures, device_figures
from muxtune.cost.memory import MemoryOptions
from muxtune.cost.profiled import ProfiledCostModel
from muxtune.cost.schema import CAPTURED, Profile
from muxtune.cost.shapes import ModelShape, model_shape, normalise_model_name
from muxtune.errors import ConfigError

MEASURED, EXTRAPOLATED, ANALYTIC = "measured", "extrapolated", "analytic"
_MOST_TIMES_WIDER = 2.0  # or narrower, is a base model that a profile of another one is used for


class CostBook:
    """Callable ``book(model, device)``: the profiled model where a profile of that pair is given,
    or one of a similar base model on that device, else the analytic one. Answers are kept, so that
    their memos serve every caller.

    ``models`` and ``devices`` add to, or replace, the built-in tables. ``similar_models``: use a
    profile for similar base models, too; what ranks exchange is seldom in it, so that this is for
    instances of one GPU.
    """

    def __init__(
        self,
        models: Mapping[str, ModelShape] | None = None,
        devices: Mapping[str, DeviceFigures] | None = None,
        profiles: Iterable[Profile] = (),
        options: AnalyticOptions | None = None,
        memory: MemoryOptions | None = None,
        similar_models: bool = False,
    ) -> None:
        self.models, self.devices = dict(models or {}), dict(devices or {})
        self.similar_models = similar_models
        self.options, self.memory = options or AnalyticOptions(), memory
        self.profiles = tuple(profiles)
        self._known: dict[tuple[str, str], ComposedCostModel] = {}

    def __call__(self, model: str, device: str) -> ComposedCostModel:
        """Raises ConfigError for a model or device that is not known."""
        key = (model, device)
        if key not in self._known:
            self._known[key] = self._build(model, device)
        return self._known[key]

    def shape(self, model: str) -> ModelShape:
        """The shape of a base model: as given to the book, as profiled, or built in."""
        if model in self.models:
            return self.models[model]
        for profile in self.profiles:
            if normalise_model_name(profile.model_name) == normalise_model_name(model):
                return profile.model_shape
        return model_shape(model)

    def figures(self, device: str) -> DeviceFigures:
        return self.devices[device] if device in self.devices else device_figures(device)

    def origin(self, model: str, device: str) -> str:
        """Where times come from: ``MEASURED``: of a profile of that base model on that device;
        ``EXTRAPOLATED``: of one of another base model; ``ANALYTIC``: of published figures."""
        profile = self._profile(model, device)
        if profile is None:
            return ANALYTIC
        return MEASURED if _same_model(profile, model) else EXTRAPOLATED

    def note(self, model: str, device: str) -> str:
        """What has to be said wherever times were not measured of that base model; else empty."""
        origin, profile = self.origin(model, device), self._profile(model, device)
        if origin == EXTRAPOLATED:
            assert profile is not None
            return (
                f"times of {model} on {device} are extrapolated from the profile of "
                f"{profile.model_name}; `muxtune profile model={model}` measures them"
            )
        if origin == MEASURED:
            return ""
        others = " and ".join(f"{item.model_name} on {item.device_name}" for item in self.profiles)
        unused = f". The profile that was given is of {others}, and is not used here"
        return (
            f"analytic figures: nothing was measured for {model} on {device}, so that all times are"
            f" extrapolated{unused if others else ''}"
        )

    def with_options(self, options: AnalyticOptions) -> CostBook:
        """The same book with other analytic options, for baselines. Of what runs eagerly, a
        profile of captured steps says nothing."""
        eager = options.style == ANALYTIC_EAGER
        profiles = [item for item in self.profiles if not (eager and item.style == CAPTURED)]
        return CostBook(
            self.models, self.devices, profiles, options, self.memory, self.similar_models
        )

    def _profile(self, model: str, device: str) -> Profile | None:
        """Of that base model, else of a similar one."""
        name = _full_name(device)
        here = [item for item in self.profiles if _full_name(item.device_name) == name]
        own = next((item for item in here if _same_model(item, model)), None)
        if own is not None or not here or not self.similar_models:
            return own
        shape = self.shape(model)
        return next((item for item in here if _is_similar(item, shape)), None)

    def _build(self, model: str, device: str) -> ComposedCostModel:
        shape, profile = self.shape(model), self._profile(model, device)
        if profile is not None:
            return profiled_model(shape, profile, self.memory)
        return AnalyticCostModel(shape, self.figures(device), self.options, self.memory)


def profiled_model(
    shape: ModelShape, profile: Profile, memory: MemoryOptions | None = None
) -> ProfiledCostModel:
    """Of the program that was profiled. Another shape than the profile's is extrapolated."""
    kind = CapturedCostModel if profile.style == CAPTURED else ProfiledCostModel
    return kind(shape, profile, memory)


def _same_model(profile: Profile, model: str) -> bool:
    return normalise_model_name(profile.model_name) == normalise_model_name(model)


def _is_similar(profile: Profile, shape: ModelShape) -> bool:
    """Whether the profile's operations are those of the base model, at widths not far off."""
    profiled = profile.model_shape
    wider = shape.hidden / profiled.hidden
    near = 1.0 / _MOST_TIMES_WIDER <= wider <= _MOST_TIMES_WIDER
    return near and _operations(shape) == _operations(profiled)


def _operations(shape: ModelShape) -> tuple[object, ...]:
    """What tells which operations a block has, whatever their sizes."""
    return (
        *(shape.family, shape.gated_mlp, shape.norm, shape.rotary, shape.weight_bytes),
        *(shape.qkv_bias, shape.linear_bias),
    )


def _full_name(device: str) -> str:
    """``H100`` and ``H100-SXM`` are one device; others than the table's are as they are called."""
    try:
        return device_figures(device).name.lower()
    except ConfigError:
        return device.lower()

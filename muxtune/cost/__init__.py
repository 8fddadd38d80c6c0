"""Cost and memory models: analytic from figures, profiled from measurements."""

from muxtune.cost.analytic import AnalyticCostModel, AnalyticOptions
from muxtune.cost.book import CostBook
from muxtune.cost.composition import nominal_load, pass_time_s
from muxtune.cost.devices import DeviceFigures, device_figures, device_table
from muxtune.cost.memory import MemoryModel, MemoryOptions
from muxtune.cost.profiled import ProfiledCostModel
from muxtune.cost.schema import Profile, load_profile, parse_profile, profile_warnings
from muxtune.cost.shapes import MODEL_SHAPES, ModelShape, from_hf_config, model_shape

__all__ = [
    "MODEL_SHAPES",
    "AnalyticCostModel",
    "AnalyticOptions",
    "CostBook",
    "DeviceFigures",
    "MemoryModel",
    "MemoryOptions",
    "ModelShape",
    "Profile",
    "ProfiledCostModel",
    "device_figures",
    "device_table",
    "from_hf_config",
    "load_profile",
    "model_shape",
    "nominal_load",
    "parse_profile",
    "pass_time_s",
    "profile_warnings",
]

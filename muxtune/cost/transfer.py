"""A profile carried over to another device by the ratio of the devices' figures.

Each point is scaled by its roofline: the time that its operations and bytes would take at the other
device's peak and bandwidth, over that at its own. What is sent between GPUs is scaled by their
links, and what the host does stays as long. How operations add up to a step is taken over as it is,
for it is dimensionless but for a pass's constant. Everything is extrapolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from muxtune.cost.devices import DeviceFigures
from muxtune.cost.profiled import ProfiledCostModel
from muxtune.cost.schema import Profile

# Bound by bytes whatever their size.
_BY_BYTES = (
    "add_norm", "norm", "swiglu", "gated_activation", "plain_activation", "add", "embedding",
    "rotary", "adamw", "adamw_idle", "adamw_active", "extra_ia3", "half_ia3",
    "adapter_load", "adapter_dropout",
)  # fmt: skip
# The host's: launches, plans, and adapters that come, go and are written.
_UNCHANGED = (
    "capture", "join", "move", "takeover", "finish", "leave", "layer_overhead", "pass_overhead",
)  # fmt: skip
_BY_LINK = ("all_reduce", "p2p")


def carried_over(profile: Profile, source: DeviceFigures, target: DeviceFigures) -> Profile:
    """The profile as it would be on ``target``, were its efficiencies those of ``source``."""
    ops = {name: _scaled(profile, name, op, source, target) for name, op in profile.ops.items()}
    device = {**profile.device, "name": target.name, "memory_bytes": target.memory_bytes}
    text = f"{profile.content_hash} carried over to {target.name}"
    return profile._replace(device=device, ops=ops, content_hash=text, steps=())


def carried_over_model(model: ProfiledCostModel, profile: Profile) -> ProfiledCostModel:
    """Of the profile that ``carried_over`` made from the model's own."""
    carried = type(model)(model.model, profile, model.memory.options)
    carried._compose_as(model)
    return carried


def _scaled(
    profile: Profile, name: str, op: Mapping[str, Any], source: DeviceFigures, target: DeviceFigures
) -> dict[str, Any]:
    points = []
    for point in op["points"]:
        ratio = time_ratio(name, point, profile.model_shape.weight_bytes, source, target)
        scaled = {key: ratio * point[key] for key in ("median_s", "p05_s", "p95_s")}
        points.append({**point, **scaled})
    return {**op, "points": points}


def time_ratio(
    name: str,
    point: Mapping[str, float],
    dtype_bytes: int,
    source: DeviceFigures,
    target: DeviceFigures,
) -> float:
    """The point's time on ``target`` over that on ``source``."""
    kind, _, shape = name.partition(".")
    plain = kind.removesuffix("_forward").removesuffix("_backward")
    if plain in _UNCHANGED:
        return 1.0
    if plain in _BY_BYTES:
        return source.memory_bytes_per_s / target.memory_bytes_per_s
    if plain in _BY_LINK:
        links = source.link_bytes_per_s, target.link_bytes_per_s
        return links[0] / links[1] if min(links) > 0.0 else 1.0
    if plain == "attention" or "rows" not in point:
        return source.peak_flops / target.peak_flops
    rows = float(point["rows"])
    sides = [float(side) for side in shape.split("x") if side.isdigit()]
    inputs, outputs = (sides[0], sides[-1]) if sides else (1.0, 1.0)
    flops = 2.0 * rows * inputs * outputs
    moved = dtype_bytes * (inputs * outputs + rows * (inputs + outputs))
    if plain == "adapter_lora":  # two thin products in place of one
        rank = float(point["rank"])
        flops = 2.0 * rows * rank * (inputs + outputs)
        moved = dtype_bytes * (rows + rank) * (inputs + outputs)

    def seconds(device: DeviceFigures) -> float:
        return max(flops / device.peak_flops, moved / device.memory_bytes_per_s)

    return seconds(target) / seconds(source)

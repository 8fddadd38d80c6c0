"""What a cost model checks of a profile's operations when it is built: which sizes they have, and
that none is missing that nothing can be predicted without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from muxtune.cost.attention import SEQUENCES
from muxtune.cost.fused_sites import fused_sites
from muxtune.cost.number_checks import is_number
from muxtune.cost.schema import CAPTURED, Profile
from muxtune.cost.shapes import LLAMA, ModelShape
from muxtune.errors import ProfileError

TP_DEGREES = (1, 2, 4, 8)  # of which a fused linear's size may be
_ROWS, _SITE, _EXTRA = ("rows",), ("slots", "rank", "rows"), ("size", "rows")
_BYTES, _PARAMETERS = ("bytes",), ("parameters",)
# By the name before the dot, without its direction.
_OF_BOTH: Mapping[str, tuple[str, ...]] = {
    "all_reduce": _BYTES, "p2p": _BYTES, "leave": ("layers",),
    **dict.fromkeys(("adapter_load", "join", "move", "finish"), _PARAMETERS),
}  # fmt: skip
_OF_EAGER: Mapping[str, tuple[str, ...]] = {
    **_OF_BOTH,
    **dict.fromkeys(("linear", "norm", "add", "embedding", "rotary", "loss"), _ROWS),
    **dict.fromkeys(("gated_activation", "plain_activation", "adapter_dropout"), _ROWS),
    "adapter_lora": ("rank", "rows"), "attention": ("length",), "adamw": ("elements",),
    "layer_overhead": (), "pass_overhead": (),
}  # fmt: skip
# With how many numbers the names have behind the dot.
_OF_CAPTURED: Mapping[str, tuple[tuple[str, ...], int]] = {
    "attention": (("rows", "pairs"), 3), "full_loss": (_ROWS, 2), "frozen": (_ROWS, 2),
    **dict.fromkeys(("add_norm", "swiglu", "embedding"), (_ROWS, 1)),
    **dict.fromkeys(("site", "site_factor", "mixed", "mixed_factor"), (_SITE, 2)),
    **dict.fromkeys(("part", "part_factor"), (_SITE, 2)),
    **{
        f"{kind}_{method}": (_EXTRA, 1)
        for kind in ("extra", "half")
        for method in ("ia3", "bottleneck", "prefix")
    },
    **dict.fromkeys(("adamw_idle", "adamw_active"), (("elements",), 0)),
}  # fmt: skip
_CAPTURES = (("rows",), ("layers",), ("rows", "first"))
_MOST = {"slots": 1 << 16, "rows": 1 << 24}  # that are counted one by one
_MOST_OTHERS = 1 << 60


def check_ops(profile: Profile) -> None:
    """Raises ProfileError naming the operation. Where there are whole steps, which are predicted at
    once, also for one that is missing; else that is found out when it is asked for."""
    if profile.style == CAPTURED:
        _check_captured(profile)
        return
    for name, op in profile.ops.items():
        expected = _OF_EAGER.get(_plain(name))
        if expected is not None:
            _check_axes(name, op, expected)


def _check_captured(profile: Profile) -> None:
    shape = profile.model_shape
    if shape.family != LLAMA or not shape.gated_mlp:
        raise ProfileError(
            f"profile of {shape.name}: program.style is {CAPTURED}, but captured steps are of"
            f" Llama's blocks only, and model.family is {shape.family}. Run `muxtune profile` again"
        )
    linears = {site.size for tp in TP_DEGREES for site in fused_sites(shape, tp)}
    for name, op in profile.ops.items():
        plain, size = _plain(name), name.partition(".")[2]
        if plain in _OF_BOTH:
            _check_axes(name, op, _OF_BOTH[plain])
        elif plain == "capture":
            if tuple(op["axes"]) not in _CAPTURES:
                raise _error(name, f"has axes {op['axes']}, not {' or '.join(map(str, _CAPTURES))}")
        elif plain in _OF_CAPTURED:
            axes, numbers = _OF_CAPTURED[plain]
            _check_axes(name, op, axes)
            _check_name(name, size, numbers)
            if axes == _SITE and size not in linears:
                raise _error(name, f"is of no linear of {shape.name}")
            _check_points(name, op)
    for name in needed_ops(shape) if profile.steps else ():
        if name not in profile.ops:
            raise ProfileError(
                f"the profile of {profile.device_name} has no op '{name}' of {shape.name}, without"
                f" which no step can be predicted. Measure it with `muxtune profile"
                f" model={shape.name}`"
            )


def needed_ops(shape: ModelShape) -> Iterator[str]:
    """Of a captured step, whatever its slots."""
    heads = f"{shape.num_heads}x{shape.num_kv_heads}x{shape.head_dim}"
    for side in ("forward", "backward"):
        yield f"attention_{side}.{heads}"
        yield f"add_norm_{side}.{shape.hidden}"
        yield f"swiglu_{side}.{shape.intermediate}"
    for site in fused_sites(shape):
        yield from (f"frozen_{side}.{site.size}" for side in ("forward", "backward"))
        yield from (f"site_{side}.{site.size}" for side in ("forward", "backward", "factor"))
    yield from (f"embedding.{shape.hidden}", f"full_loss.{shape.hidden}x{shape.vocab}")
    yield from ("adamw_idle", "adamw_active")


def _plain(name: str) -> str:
    kind = name.partition(".")[0]
    return kind.removesuffix("_forward").removesuffix("_backward")


def _check_axes(name: str, op: Mapping[str, Any], expected: tuple[str, ...]) -> None:
    if tuple(op["axes"]) != expected:
        raise _error(name, f"has axes {op['axes']}, not {list(expected)}")


def _check_name(name: str, size: str, count: int) -> None:
    numbers = size.split("x") if size else []
    if len(numbers) != count or not all(
        x.isdecimal() and len(x) < 18 and int(x) > 0 for x in numbers
    ):
        raise _error(name, f"is not named by {count} sizes")


def _check_points(name: str, op: Mapping[str, Any]) -> None:
    """Logarithms of sizes are taken, and slots and rows are counted one by one."""
    counts_sequences = any(SEQUENCES[0] in point for point in op["points"])
    for index, point in enumerate(op["points"]):
        for axis in op["axes"]:
            most = _MOST.get(axis, _MOST_OTHERS)
            if not 1 <= point[axis] <= most:
                raise _error(name, f"point {index} has {axis} {point[axis]}, not from 1 to {most}")
        if counts_sequences and name.startswith("attention"):
            counts = [point.get(sequence) for sequence in SEQUENCES]
            if not all(is_number(x) and 0 <= x <= _MOST["rows"] for x in counts) or not any(counts):
                raise _error(name, f"point {index} does not tell its sequences")


def _error(name: str, problem: str) -> ProfileError:
    return ProfileError(f"profile op '{name}' {problem}. Run `muxtune profile` again")

"""The profile: measured times of single operations of one model on one device, as JSON.

Version 1::

    {"schema_version": 1,
     "device": {"name", "kind", "processor", "threads", "memory_bytes", ...},
     "software": {"python", "torch", ...},
     "model": {fields of ModelShape},
     "created": "2026-01-31T12:00:00Z",
     "ops": {name: {"unit": "s", "axes": [axis, ...],
                    "points": [{axis: size, ..., "median_s", "p05_s", "p95_s", "repeats"}]}},
     "program": {"style": "eager" | "captured", "deterministic": bool},
     "steps": [whole steps, see ``calibration.WholeStep``],
     "clocks": {"samples": [...]},
     "quality": {"spread": ..., "interrupted": ..., "taken_bytes": ...},
     "content_hash": sha256 of the canonical JSON of all of the above}

``program``, ``steps``, ``clocks`` and ``quality`` may be missing. The few whole steps fit how
operations add up; the cost model is scored on others. ``interrupted`` and ``taken_bytes``
(``muxtune.cost.sharing``) are of GPUs only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from muxtune.cost.calibration import MIN_STEPS, WholeStep
from muxtune.cost.number_checks import is_number
from muxtune.cost.shapes import ModelShape, checked_shape
from muxtune.cost.sharing import SIGNS, sharing_warnings
from muxtune.cost.step_checks import MOST_LAYERS, MOST_S, problem_of
from muxtune.errors import ConfigError, ProfileError

SCHEMA_VERSION = 1
EAGER, CAPTURED = "eager", "captured"
# Of a typical point: beyond it somebody else used the device. Replays of a graph on a GPU of one's
# own repeat to 0.6 to 1.1% (five profiles of H100 and H200), beside another process they were
# measured to spread by 4.2%; a host that launches every kernel, or computes itself, repeats worse.
SHARED_SPREAD, SHARED_REPLAYS_SPREAD = 0.25, 0.025
_REMEDY = "Make it again with `muxtune profile`"
_SECTIONS = ("device", "software", "model", "ops")
_OPTIONAL = {"program": dict, "steps": list, "clocks": dict, "quality": dict}
_KNOWN = {*_SECTIONS, *_OPTIONAL, "schema_version", "created", "content_hash"}
_TIMES = ("median_s", "p05_s", "p95_s")
# Of these each point is a call, a plan or a capture, of which two may be of one size; all are
# fitted to. Of others a size has one time.
_MAY_REPEAT = ("attention_forward", "attention_backward", "capture", "takeover")
_SAMPLE = ModelShape("model", 1, 1, 1, 1, 1, 1, 1)  # what its fields are made of
_MOST_SIZE = 1e18  # whose square a float holds with ease
_MOST_OF_OTHERS = 100_000_000  # numbers of a model, but for its layers
_ODD = (KeyError, TypeError, ValueError, OverflowError, AttributeError)  # of content that is none


class Profile(NamedTuple):
    """A validated profile; the sections are as in the JSON."""

    device: Mapping[str, Any]
    software: Mapping[str, Any]
    model: Mapping[str, Any]
    created: str
    ops: Mapping[str, Mapping[str, Any]]
    content_hash: str
    program: Mapping[str, Any] = {}
    steps: tuple[WholeStep, ...] = ()
    quality: Mapping[str, Any] = {}

    @property
    def style(self) -> str:
        """Which program the operations are of: eager or captured."""
        return str(self.program.get("style", EAGER))

    @property
    def device_name(self) -> str:
        return str(self.device.get("name", ""))

    @property
    def memory_bytes(self) -> float:
        """Of the device. Raises ProfileError where the profile does not say."""
        if "memory_bytes" not in self.device:
            raise ProfileError(f"profile of {self.device_name}: no device.memory_bytes. {_REMEDY}")
        return float(self.device["memory_bytes"])

    @property
    def model_name(self) -> str:
        return str(self.model.get("name", ""))

    @property
    def model_shape(self) -> ModelShape:
        """Raises ProfileError when the model section is not a shape."""
        try:
            return checked_shape(ModelShape(**self.model))
        except (TypeError, ConfigError) as error:
            raise ProfileError(f"profile.model: {error}. {_REMEDY}") from error


def content_hash(raw: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON (sorted keys, no spaces) without ``content_hash``."""
    rest = {key: value for key, value in raw.items() if key != "content_hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def parse_profile(raw: Mapping[str, Any], source: str = "profile") -> Profile:
    """A checked Profile. Raises ProfileError: another version, altered or incomplete content,
    times that are negative, zero, not finite or out of order."""
    try:
        return _parsed(raw, source)
    except _ODD as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        raise ProfileError(f"{source}: cannot be read as a profile ({told}). {_REMEDY}") from error


def _parsed(raw: Mapping[str, Any], source: str) -> Profile:
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ProfileError(
            f"{source}: schema_version is {version!r}, this muxtune reads {SCHEMA_VERSION}."
            f" {_REMEDY}"
        )
    _check_sections(source, raw)
    if raw.get("content_hash") != _safe_hash(raw, source):
        raise ProfileError(
            f"{source}: content_hash does not match the content, so the file was altered or cut."
            f" {_REMEDY}"
        )
    if not raw["ops"]:
        raise ProfileError(f"{source}: holds no operation at all. {_REMEDY}")
    for name, op in raw["ops"].items():
        _check_op(source, name, op)
    profile = Profile(
        raw["device"], raw["software"], raw["model"], str(raw.get("created", "")), raw["ops"],
        raw["content_hash"], raw.get("program", {}), _steps(source, raw.get("steps", [])),
        raw.get("quality", {}),
    )  # fmt: skip
    _check_fields(source, profile)
    return profile


def _check_sections(source: str, raw: Mapping[str, Any]) -> None:
    for section in _SECTIONS:
        if not isinstance(raw.get(section), Mapping):
            raise ProfileError(f"{source}: section '{section}' is missing. {_REMEDY}")
    for section, kind in _OPTIONAL.items():
        if section in raw and not isinstance(raw[section], kind):
            raise ProfileError(f"{source}: section '{section}' is not a {kind.__name__}. {_REMEDY}")
    if unknown := sorted(set(raw) - _KNOWN):
        raise ProfileError(f"{source}: section '{unknown[0]}' is not known. {_REMEDY}")


def _check_fields(source: str, profile: Profile) -> None:
    """What would otherwise be found out far from here, or never."""
    name, kind = profile.device.get("name"), profile.device.get("kind", "cpu")
    if not name or not isinstance(name, str):
        raise ProfileError(f"{source}: device.name is missing. {_REMEDY}")
    if kind not in ("cpu", "gpu"):
        raise ProfileError(f"{source}: device.kind is {kind!r}, not cpu or gpu. {_REMEDY}")
    for section, field, values in (
        ("device", "memory_bytes", profile.device),
        *(("quality", name, profile.quality) for name in ("spread", *SIGNS)),
    ):
        if not is_number(values.get(field, 0.0)):
            problem = f"{section}.{field} is {values[field]!r}, which is no number"
            raise ProfileError(f"{source}: {problem}. {_REMEDY}")
    if profile.device.get("memory_bytes", 1.0) <= 0:
        problem = f"device.memory_bytes is {profile.device['memory_bytes']}, not more than 0"
        raise ProfileError(f"{source}: {problem}. {_REMEDY}")
    if profile.style not in (EAGER, CAPTURED):
        problem = f"program.style is '{profile.style}', not {EAGER} or {CAPTURED}"
        raise ProfileError(f"{source}: {problem}. {_REMEDY}")
    try:
        _check_model(profile.model)
        _ = profile.model_shape
    except ProfileError as error:
        raise ProfileError(f"{source}: {error}") from error


def _check_model(model: Mapping[str, Any]) -> None:
    """The kinds of its numbers, and that they are no larger than any model's."""
    for field, sample in _SAMPLE._asdict().items():
        value = model.get(field, sample)
        if type(value) is not type(sample):
            kind = type(sample).__name__
            raise ProfileError(f"profile.model: model.{field} is {value!r}, no {kind}. {_REMEDY}")
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        least = 0 if field == "position_rows" else 1
        most = MOST_LAYERS if field == "num_layers" else _MOST_OF_OTHERS
        if not least <= value <= most:
            told = str(value) if is_number(value) else "too large"
            problem = f"model.{field} is {told}, not from {least} to {most:,}"
            raise ProfileError(f"profile.model: {problem}. {_REMEDY}")


def _steps(source: str, raw: Any) -> tuple[WholeStep, ...]:
    found = []
    for index, item in enumerate(raw):
        where = f"{source}: step {index}"
        try:
            step = WholeStep.of_json(item)
        except _ODD as error:
            told = f"{type(error).__name__}: {error}"
            raise ProfileError(f"{where} cannot be read ({told}). {_REMEDY}") from error
        if problem := problem_of(step):
            raise ProfileError(f"{where} {problem}. {_REMEDY}")
        found.append(step)
    return tuple(found)


def _safe_hash(raw: Mapping[str, Any], source: str) -> str:
    try:
        return content_hash(raw)
    except (TypeError, ValueError) as error:
        raise ProfileError(f"{source}: is not plain JSON ({error}). {_REMEDY}") from error


def _check_op(source: str, name: str, op: Any) -> None:
    where = f"{source}: op '{name}'"
    if not isinstance(op, Mapping) or op.get("unit") != "s":
        raise ProfileError(f"{where} has no unit 's'. {_REMEDY}")
    axes, points = op.get("axes"), op.get("points")
    if not isinstance(axes, list) or not isinstance(points, list) or not points:
        raise ProfileError(f"{where} has no axes or no points. {_REMEDY}")
    if not all(isinstance(axis, str) for axis in axes) or len({*axes, *_TIMES}) < len(axes) + 3:
        raise ProfileError(f"{where} has axes {axes!r}, not names that all differ. {_REMEDY}")
    seen: dict[tuple[float, ...], int] = {}
    for index, point in enumerate(points):
        numbers = [point.get(key) for key in (*axes, *_TIMES)] if isinstance(point, Mapping) else []
        if not numbers or not all(map(is_number, numbers)):
            raise ProfileError(f"{where} point {index} has a missing or odd number. {_REMEDY}")
        if point["median_s"] <= 0 or not 0 <= point["p05_s"] <= point["median_s"] <= point["p95_s"]:
            raise ProfileError(
                f"{where} point {index} has times that are negative or out of order. {_REMEDY}"
            )
        if any(point[axis] < 0 for axis in axes):
            raise ProfileError(f"{where} point {index} has a negative size. {_REMEDY}")
        if max(point["p95_s"] / MOST_S, *(point[axis] / _MOST_SIZE for axis in axes), 0.0) > 1.0:
            raise ProfileError(f"{where} point {index} has a time or size too large. {_REMEDY}")
        sizes = tuple(float(point[axis]) for axis in axes)
        first = seen.setdefault(sizes, index)
        if first != index and name.partition(".")[0] not in _MAY_REPEAT:
            problem = f"point {index} has the sizes of point {first}"
            raise ProfileError(f"{where} {problem}. {_REMEDY}")


def load_profile(path: str | Path) -> Profile:
    """Reads and checks a profile file. Raises ProfileError naming the file and the remedy."""
    source = str(path)
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ProfileError(f"{source}: there is no such file. {_REMEDY}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{source}: cannot be read ({error}). {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{source}: is cut or not JSON ({error}). {_REMEDY}") from error
    if not isinstance(raw, dict):
        raise ProfileError(f"{source}: is not a profile. {_REMEDY}")
    return parse_profile(raw, source)


def profile_warnings(
    profile: Profile,
    device: Mapping[str, Any] | None = None,
    software: Mapping[str, Any] | None = None,
) -> list[str]:
    """One line for every respect in which the machine in use differs from the profiled one, and
    one each for a profile that was measured while something else used the device, or holds too few
    whole steps to tell how far off it is."""
    lines = []
    for section, then, now in (
        ("device", profile.device, device or {}),
        ("software", profile.software, software or {}),
    ):
        for key in sorted(set(then) & set(now) & _COMPARED):
            if then[key] != now[key]:
                lines.append(
                    f"profile of another {section}: {key} was {then[key]!r}, is {now[key]!r};"
                    " predictions may be off, run `muxtune profile`"
                )
    spread = float(profile.quality.get("spread", 0.0))
    replays = profile.style == CAPTURED and profile.device.get("kind") == "gpu"
    most = SHARED_REPLAYS_SPREAD if replays else SHARED_SPREAD
    if spread > most:
        lines.append(
            f"profile of a busy device: repeats of an operation typically spread by {spread:.1%}"
            f" (at most {most:.1%} on a device of one's own); stop what else runs on it"
            " and run `muxtune profile` again"
        )
    count = len(profile.steps)
    if count < MIN_STEPS and (count or profile.style == CAPTURED):
        lines.append(
            f"profile of {count} whole step{'' if count == 1 else 's'}: how operations add up is"
            f" told by {MIN_STEPS} or more, so intervals are wide; profile with a larger budget_s"
            " (and steps=true)"
        )
    return lines + sharing_warnings("profile", profile.quality)


_COMPARED = {
    *("name", "kind", "processor", "threads", "driver", "cuda"),
    *("torch", "triton", "transformers", "muxtune"),
}

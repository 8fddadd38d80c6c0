"""Figures of devices: peaks, memory, links, prices. Catalogue values, not measurements."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from muxtune.errors import ConfigError

GB = 1_000_000_000


class DeviceFigures(NamedTuple):
    """Published figures of one device.

    ``peak_flops``: dense bf16 FLOP/s (fp32 for a CPU). ``memory_bytes``: vendor gigabytes taken
    as 1e9, a little less than the device really has. ``link_bytes_per_s``: one direction between
    two devices (NVLink where there is one, else PCIe). Prices are USD per device and hour.
    ``power_w``: thermal design power, what it draws at most; 0 where it is not known.
    """

    name: str
    peak_flops: float
    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float
    kind: str = "gpu"
    usd_per_hour: tuple[float, float, float] = (0.0, 0.0, 0.0)  # low, typical, high
    price_date: str = ""
    price_source: str = ""
    notes: str = ""
    power_w: float = 0.0

    @property
    def ridge_flops_per_byte(self) -> float:
        """Arithmetic intensity from which compute, not memory, is the limit."""
        return self.peak_flops / self.memory_bytes_per_s


GENERIC_CPU = DeviceFigures(
    name="cpu",
    peak_flops=100e9,
    memory_bytes=8 * GB,
    memory_bytes_per_s=10e9,
    link_bytes_per_s=5e9,
    host_link_bytes_per_s=10e9,
    kind="cpu",
    notes="placeholder of a 2-core server CPU in fp32; measure the machine with `muxtune profile`",
)
_DEFAULT_OF_FAMILY = {
    "a100": "a10080gbsxm", "a10040gb": "a10040gbsxm", "a10080gb": "a10080gbsxm",
    "h100": "h100sxm", "h100sxm5": "h100sxm", "h10080gb": "h100sxm", "h100hbm3": "h100sxm",
    "h10080gbhbm3": "h100sxm", "h200": "h200sxm",
}  # fmt: skip


@cache
def device_table() -> Mapping[str, DeviceFigures]:
    """All built-in devices by name, ``cpu`` included."""
    text = files("muxtune.cost").joinpath("data/devices.csv").read_text(encoding="utf-8")
    rows = [_from_row(row) for row in csv.DictReader(text.splitlines())]
    return {figures.name: figures for figures in (*rows, GENERIC_CPU)}


def _from_row(row: Mapping[str, str]) -> DeviceFigures:
    # Bidirectional link figures: one direction is half.
    nvlink, pcie = float(row["nvlink_gb_s_bidir"]), float(row["pcie_gb_s_bidir"])
    prices = tuple(float(row[f"usd_per_gpu_hour_{level}"]) for level in ("low", "typical", "high"))
    return DeviceFigures(
        name=row["device"],
        peak_flops=float(row["bf16_dense_tflops"]) * 1e12,
        memory_bytes=int(float(row["mem_gb"]) * GB),
        memory_bytes_per_s=float(row["mem_bw_gb_s"]) * GB,
        link_bytes_per_s=(nvlink or pcie) / 2 * GB,
        host_link_bytes_per_s=pcie / 2 * GB,
        usd_per_hour=(prices[0], prices[1], prices[2]),
        price_date=row["price_date"],
        price_source=row["price_source"],
        notes=row["notes"] or "",
        power_w=float(row["tdp_w"] or 0.0),
    )


def _key(name: str) -> str:
    squeezed = re.sub(r"[^a-z0-9]", "", name.lower())
    return squeezed.removeprefix("nvidia").removeprefix("geforce")


def device_figures(name: str, overrides: Mapping[str, float] | None = None) -> DeviceFigures:
    """A device by name: case, spaces, dashes and the vendor are ignored; ``H100`` means the SXM
    part and ``A100`` the 80 GB SXM part. ``overrides`` replaces single figures.

    Raises ConfigError: unknown name (lists those known), unknown figure, or one not positive.
    """
    known = {_key(figures.name): figures for figures in device_table().values()}
    key = _key(name)
    key = _DEFAULT_OF_FAMILY.get(key, key)
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{known[close[0]].name}'? " if close else ""
        names = ", ".join(device_table())
        raise ConfigError("device", f"'{name}' is not known", f"{hint}choose one of: {names}")
    return checked_figures(known[key]._replace(**_known_only(overrides or {})))


def _known_only(overrides: Mapping[str, float]) -> dict[str, float]:
    for field in overrides:
        if field not in DeviceFigures._fields:
            names = ", ".join(DeviceFigures._fields)
            raise ConfigError(f"device.{field}", "is no figure of a device", f"choose: {names}")
    return dict(overrides)


def checked_figures(figures: DeviceFigures) -> DeviceFigures:
    """The figures themselves; ConfigError when one is not a positive, finite number."""
    for field in ("peak_flops", "memory_bytes", "memory_bytes_per_s", "link_bytes_per_s"):
        value = getattr(figures, field)
        if not 0 < value < float("inf"):
            raise ConfigError(f"device.{field}", f"is {value}", "give a positive, finite number")
    return figures

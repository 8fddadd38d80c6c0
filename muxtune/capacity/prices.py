"""What a GPU and hour costs: what the user says, else the device table, with its date."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from muxtune.cost.devices import DeviceFigures, device_figures, device_table
from muxtune.errors import ConfigError

GIVEN = "given by the user"


class Price(NamedTuple):
    """USD per GPU and hour; ``low`` and ``high`` of the market, or of a relative change."""

    device: str
    usd_per_gpu_hour: float
    low: float
    high: float
    date: str
    source: str


def prices_of(
    devices: Sequence[str], given: Mapping[str, float], change: float | None
) -> dict[str, Price]:
    """By device. ``change``: how far a price may be off, relative; None: the table's low and high,
    or 20% where the user gave a price of their own.

    Raises ConfigError for a device without a price, a price that is no positive number, and a
    price for a device that is not among those asked about.
    """
    for name in given:
        if name not in devices:
            remedy = f"The devices are: {', '.join(devices)}"
            raise ConfigError(f"prices.{name}", "is of a device that is not asked about", remedy)
    return {device: _price(device, given.get(device), change) for device in devices}


def _price(device: str, given: float | None, change: float | None) -> Price:
    if given is not None:
        if not (math.isfinite(given) and given > 0):
            raise ConfigError(f"prices.{device}", f"is {given}", "Give USD per GPU and hour")
        change = 0.2 if change is None else change
        return Price(device, given, given * (1 - change), given * (1 + change), "", GIVEN)
    figures = _figures(device)
    if figures is None or figures.usd_per_hour[1] <= 0:
        known = ", ".join(name for name, item in device_table().items() if item.usd_per_hour[1])
        raise ConfigError(
            f"prices.{device}",
            "is not known, and is not guessed",
            f"Give prices.{device}=USD per GPU and hour. The device table has prices of: {known}",
        )
    low, typical, high = figures.usd_per_hour
    if change is not None:
        low, high = typical * (1 - change), typical * (1 + change)
    return Price(device, typical, low, high, figures.price_date, figures.price_source)


def _figures(device: str) -> DeviceFigures | None:
    try:
        return device_figures(device)
    except ConfigError:
        return None

"""Adapter methods by name. A method is one file against ``contract.AdapterMethod``."""

from __future__ import annotations

import difflib

from muxtune.errors import ConfigError
from muxtune.runtime.adapters.bottleneck import Bottleneck
from muxtune.runtime.adapters.contract import AdapterMethod
from muxtune.runtime.adapters.dora import Dora
from muxtune.runtime.adapters.ia3 import IA3
from muxtune.runtime.adapters.lora import Lora
from muxtune.runtime.adapters.prefix import Prefix
from muxtune.runtime.adapters.prompt import Prompt

_ALL: tuple[AdapterMethod, ...] = (
    Lora(),
    Dora(),
    IA3(),
    Bottleneck(),
    Prefix(),
    Prompt(),
)
METHODS: dict[str, AdapterMethod] = {method.name: method for method in _ALL}


def adapter_method(name: str) -> AdapterMethod:
    """Raises ConfigError, listing the methods that exist, for an unknown one."""
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(name, METHODS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    remedy = f"{hint}Choose one of: {', '.join(sorted(METHODS))}"
    raise ConfigError("adapter.method", f"'{name}' does not exist", remedy)

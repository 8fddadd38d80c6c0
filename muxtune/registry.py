"""Policies by name: the built-in ones, and those that other packages add by entry points.

A built-in policy registers itself with a decorator when its module is imported. Another package
adds one through the entry-point groups ``muxtune.planners`` and ``muxtune.cluster_policies``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from muxtune.errors import ConfigError

Factory = Callable[..., Any]
_Registered = TypeVar("_Registered", bound=Factory)


class Registry:
    """Names to factories of one kind of plug-in. ``package`` holds the built-in files."""

    def __init__(self, field: str, group: str, package: str) -> None:
        self.field, self.group, self.package = field, group, package
        self._factories: dict[str, Factory] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[_Registered], _Registered]:
        """Decorator: makes a class or function buildable by ``name``."""

        def add(factory: _Registered) -> _Registered:
            known = self._factories.get(name)
            if known is not None and known is not factory:
                raise ConfigError(self.field, f"'{name}' is registered twice", "rename one of them")
            self._factories[name] = factory
            return factory

        return add

    def names(self) -> list[str]:
        self._load_builtin()
        return sorted({*self._factories, *(entry.name for entry in self._entries())})

    def get(self, name: str) -> Factory:
        """Raises ConfigError, listing the names that exist, for an unknown name."""
        self._load_builtin()
        if name in self._factories:
            return self._factories[name]
        for entry in self._entries():
            if entry.name == name:
                return entry.load()
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        remedy = f"{hint}choose one of: {', '.join(self.names())}"
        raise ConfigError(self.field, f"'{name}' does not exist", remedy)

    def _entries(self):
        return entry_points(group=self.group)

    def _load_builtin(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")


PLANNERS = Registry("planner", "muxtune.planners", "muxtune.planners")
CLUSTER_POLICIES = Registry(
    "cluster_policy", "muxtune.cluster_policies", "muxtune.cluster_policies"
)

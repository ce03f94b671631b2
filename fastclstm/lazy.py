"""Names that a module has without having imported them: what is imported when first used, and what moved."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def on_first_use(module: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a module's ``__getattr__``, which imports a name from its home, and ``__dir__``.

    The home of a submodule is the submodule.
    """

    def __getattr__(name: str) -> Any:
        value = _found(module, name, homes)
        setattr(sys.modules[module], name, value)  # so that this is asked once
        return value

    def __dir__() -> list[str]:
        names = vars(sys.modules[module])
        return sorted(names.get("__all__") or {*names, *homes})

    return __getattr__, __dir__


def submodules(package: str, *names: str) -> dict[str, str]:
    """Return the homes of a package's submodules."""
    return {name: f"{package}.{name}" for name in names}


def moved(module: str, homes: Mapping[str, str], here: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` for names that live elsewhere now: a DeprecationWarning says where.

    Names of `here` are the module's own, imported from their homes when first used.
    """

    def __getattr__(name: str) -> Any:
        if here is not None and name in here:
            return _found(module, name, here)
        value = _found(module, name, homes)
        told = f"{module}.{name} is {homes[name]}.{name} now"
        warnings.warn(told, DeprecationWarning, stacklevel=2)
        return value

    return __getattr__


def _found(module: str, name: str, homes: Mapping[str, str]) -> Any:
    if name not in homes:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home = importlib.import_module(homes[name])
    return home if home.__name__ == f"{module}.{name}" else getattr(home, name)

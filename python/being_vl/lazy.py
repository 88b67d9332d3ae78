"""Packages that import a name's module when the name is first used (PEP 562)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package.

    Args:
        package: Its `__name__`.
        modules: Module, relative to the package → the names that the package offers from it.
    """
    modules_of_names = {name: module for module, names in modules.items() for name in names}

    def getattr_(name: str) -> Any:
        if name not in modules_of_names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules_of_names[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules_of_names})

    return getattr_, dir_

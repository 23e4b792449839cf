"""Descriptions that come with the package, a module for each family of models.

Each module has a tuple ``DESCRIPTIONS``; a new module is found by being here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from corequant_transformers.architectures.description import Architecture

__all__ = ["described"]


def described() -> Iterator[Architecture]:
    """Yield the descriptions of all modules of this package."""
    for module in sorted(found.name for found in iter_modules(__path__)):
        yield from import_module(f"{__name__}.{module}").DESCRIPTIONS

"""Patching a module of Transformers as soon as it is imported, without importing it now."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["install_when_imported"]

_QUANTIZERS = "transformers.quantizers.auto"


class _Finder:
    """Has the hook installed at the end of the one import that it waits for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _QUANTIZERS else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_install(module: ModuleType) -> None:
                execute(module)
                with contextlib.suppress(ValueError):  # there is none after a reload
                    sys.meta_path.remove(self)
                _install()

            spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


def _install() -> None:
    from corequant_transformers.checkpoint.quantizer import register_method
    from corequant_transformers.exports.transformers_hook import install

    register_method()
    install()


def install_when_imported() -> None:
    """Register ``quantizer`` and ``transformers_hook`` now, or when Transformers has registries."""
    if _QUANTIZERS in sys.modules:
        _install()
    else:
        sys.meta_path.insert(0, _Finder())

"""Descriptions read from files: TOML, or Python that the user names."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from corequant.errors import ArchitectureError
from corequant.storage.files import read_text
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.known import forget, known_architectures, register

__all__ = ["read_architecture", "registered"]

_VARIABLE = "ARCHITECTURE"


def read_architecture(path: str | Path) -> Architecture:
    r"""Read the description of an architecture from a file.

    Parameters
    ----------
    path : str or Path
        A TOML file with the fields of ``Architecture`` that aren't Llama's, None being ``"none"``.
        Or a Python file, which is run, and has to leave an ``Architecture`` named ``ARCHITECTURE``;
        it may import or define the model's class and register it with Transformers.

    Returns
    -------
    Architecture
        To be given to ``register``.

    Raises
    ------
    ArchitectureError
        If the file can't be read, or a field is unknown, missing or wrong; names file, field, rule
        and value.

    Examples
    --------
    >>> import pathlib, tempfile, corequant_transformers as cqhf
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "starcoder2.toml")
    ...     _ = file.write_text('model_type = "starcoder2"\nnorm = "layer"\ngate = "none"')
    ...     cqhf.read_architecture(file).norm
    'layer'
    """
    path = Path(path)
    if path.suffix not in (".toml", ".py"):
        raise ArchitectureError(f"a description must be in a .toml or .py file, got {path}")
    try:
        if path.suffix == ".py":
            return _run(path)
        return Architecture.from_toml(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ArchitectureError(f"{path} must be a readable UTF-8 file: {error}") from error
    except ArchitectureError as error:
        raise ArchitectureError(f"{path}: {error}") from None


def _run(path: Path) -> Architecture:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        found = runpy.run_path(str(path)).get(_VARIABLE)
    except Exception as error:
        raise ArchitectureError(
            f"the file must run without an error: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Architecture):
        raise ArchitectureError(f"{_VARIABLE} must be an Architecture, got {type(found).__name__}")
    return found


@contextmanager
def registered(architecture: Architecture | None) -> Iterator[None]:
    """Register an architecture within a context, replacing another of its type."""
    if architecture is None:
        yield
        return
    kind = architecture.model_type
    before = known_architectures().get(kind)
    register(architecture)
    try:
        yield
    finally:
        if before is None:
            forget(kind)
        else:
            register(before)

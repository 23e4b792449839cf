"""Where a result goes, in the layout that the program it is for reads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from corequant.errors import CorequantError, OutputError, RecipeError
from corequant.recipe import READERS, check_reader
from corequant_transformers.checkpoint.quantized import Quantized
from corequant_transformers.exports.prospect import Prospect
from corequant_transformers.exports.targets import check_target, write_layout
from corequant_transformers.files.outputs import check_file_output, check_output, real_path
from corequant_transformers.model.sources import Source
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.planning.rules import fusion_conflict

__all__ = ["Destination"]

Conversion = Callable[[Path, Path, Callable[[Path], object]], None]
"""Called with corequant's own directory, the folder for what isn't whole yet, and what to call with
the result when it is whole."""


class Destination:
    """Where a result goes, and the program that it is for.

    Parameters
    ----------
    output : str or Path
        A new or empty directory, or a new file that ends in ``.gguf`` for llama.cpp.
    reader : str
        One of ``READERS``; a directory of corequant's own needs no conversion.

    Raises
    ------
    RecipeError
        If there is no such reader.
    """

    def __init__(self, output: str | Path, reader: str = "corequant") -> None:
        self.output, self.reader = output, check_reader(reader)
        self.layout = READERS[reader]

    def check(self, *, begun: bool = False) -> None:
        """Refuse an output that can't be written; one that was begun may hold something."""
        if self.layout == "gguf":
            check_file_output(self.output, ".gguf", new=not begun)
        elif str(self.output).endswith(".gguf"):
            raise OutputError(
                f"output must be a directory for {self.reader}, got {self.output}; a .gguf file is "
                "written for llama.cpp (--for llama.cpp, reader='llama.cpp')"
            )
        else:
            check_output(self.output, allow_full=begun)

    def check_plan(self, plan: ModelPlan, config: Any, source: Source | None) -> None:
        """Refuse a plan whose result the reader can't run, before any work is done."""
        if self.layout == "corequant":
            return
        conflict = fusion_conflict(plan.matrices)
        if self.reader == "vllm" and conflict is not None:
            raise RecipeError(f"vllm can't run the result: {conflict}; give one rule for both")
        if self.reader == "vllm":
            _check_vocabulary(plan)
        where = (Path(), "") if source is None else (source.path, source.name)
        try:
            prospect = Prospect(plan, config, *where)
            check_target(self.layout, prospect, self._origin(source))
        except CorequantError as error:
            raise type(error)(f"{self.reader} can't run the result: {error}") from error

    def conversion(self, source: Source | None) -> Conversion | None:
        """Return what makes the result of corequant's own directory; None where it is that."""
        if self.layout == "corequant":
            return None
        return partial(self._convert, self._origin(source))

    def _convert(
        self, origin: Path | None, own: Path, within: Path, complete: Callable[[Path], object]
    ) -> None:
        write_layout(own, self.output, self.layout, source=origin, within=within, complete=complete)

    def save(self, result: Quantized, source: Source | None) -> None:
        """Write the result of a run that kept everything in memory."""
        convert = self.conversion(source)
        if convert is None:
            result.save(self.output)
            return
        target = real_path(self.output)
        try:
            with tempfile.TemporaryDirectory(".tmp", f".{target.name}.", target.parent) as folder:
                own = result.save(Path(folder) / "own")
                convert(own, Path(folder), lambda made: None)
        except OSError as error:
            if isinstance(error, CorequantError):
                raise
            raise OutputError(f"{target} could not be written: {error}") from error

    def _origin(self, source: Source | None) -> Path | None:
        """Return where a GGUF file's metadata and tokenizer come from."""
        return source.path if source is not None and self.layout == "gguf" else None


def _check_vocabulary(plan: ModelPlan) -> None:
    for matrix in plan.quantized:
        option = {"embedding": "embeddings", "head": "head"}.get(matrix.role)
        if option is not None:
            raise RecipeError(
                f"vllm can't run the result: {option} must be none, since vLLM reads codes of "
                f"linear layers in decoder blocks only, got {matrix.weights}; transformers and "
                "llama.cpp read them"
            )

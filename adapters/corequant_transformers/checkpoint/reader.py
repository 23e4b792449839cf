"""A quantized directory read tensor by tensor, without building the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import corequant as cq
from corequant.errors import CheckpointError
from corequant.storage.arrays import from_arrays
from corequant.storage.tensor_file import RawTensor, TensorFile
from corequant_transformers.checkpoint.writer import WEIGHTS, read_plan
from corequant_transformers.files.atomic import read_json
from corequant_transformers.files.digests import check_digests, warn_of_none
from corequant_transformers.model.sources import files_to_copy
from corequant_transformers.planning.matrix_plan import MatrixPlan

__all__ = ["Stored"]


class Stored:
    """A directory that ``quantize`` wrote.

    Parameters
    ----------
    path : str or Path
    verify : bool
        Whether ``check`` compares all files with their digests.

    Attributes
    ----------
    plan : ModelPlan
    config : transformers.PreTrainedConfig
        The float model's.
    float_config : dict
        The float model's ``config.json``.
    source_name : str
        Of the file or directory that was quantized; empty if that was a model in memory.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated or malformed.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.folder, self._verify = Path(path), verify
        self.plan, self.config = read_plan(self.folder)
        self.float_config = read_json(self.folder / "float_config.json")
        name = read_json(self.folder / "report.json").get("source")
        self.source_name = name if isinstance(name, str) else ""
        self._file = TensorFile(self.folder / WEIGHTS)

    def check(self) -> None:
        """Raise CheckpointError if a file isn't as it was written."""
        if self._verify and check_digests(self.folder) is None:
            warn_of_none(self.folder)

    def quantized(self, matrix: MatrixPlan) -> cq.QuantizedTensor:
        """Return the codes and scales of a quantized matrix."""
        prefix = f"{matrix.name}.weight_"
        own = {n: self._file.read(n).array() for n in self._file.names if n.startswith(prefix)}
        return from_arrays(matrix.name, own, self.plan.recipe.weights, matrix.shape)

    def rest(self) -> list[str]:
        """Return the names of what isn't quantized: embeddings, norms, biases, the head."""
        codes = tuple(f"{m.name}.weight_" for m in self.plan.quantized)
        return [n for n in self._file.names if not n.startswith(codes)]

    def read(self, name: str) -> RawTensor:
        """Return a tensor that isn't quantized in float32, which must have its numbers."""
        tensor = self._file.read(name)
        if tensor.dtype == "F32":
            return tensor
        where = f"{name} of {self._file.path}"
        if tensor.dtype not in ("F64", "F16", "BF16"):
            raise CheckpointError(f"{where} must be F32, got {tensor.dtype}")
        given = tensor.array()
        with np.errstate(over="ignore"):
            numbers = given.astype(np.float32)
        if not np.array_equal(numbers, given):
            raise CheckpointError(
                f"{where} must be F32, got {tensor.dtype} with numbers that F32 doesn't have"
            )
        return RawTensor.of(numbers)

    def copied_files(self) -> list[Path]:
        """Return the tokenizer's and generation's files."""
        return files_to_copy(self.folder)

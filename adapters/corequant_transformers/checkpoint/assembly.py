"""Replacement of layers by ``QuantizedLinear`` while Transformers builds and fills a model.

Before Transformers reads weights, linear layers make place for layers that hold what is stored of
them, codes and scales; afterwards these decode it. What Transformers would only warn of, tensors
that are missing or left over, is an error here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from corequant.errors import CheckpointError, RecipeError
from corequant.quantization import QuantizedTensor
from corequant.recipe import Recipe
from corequant.storage.arrays import from_arrays
from corequant.storage.tensor_file import RawTensor, TensorFile
from corequant_transformers.architectures.known import keep_architecture
from corequant_transformers.checkpoint.origin import read_description
from corequant_transformers.checkpoint.saving import Saving
from corequant_transformers.checkpoint.tensors import array_of
from corequant_transformers.files.comparison import Comparison
from corequant_transformers.files.marks import WEIGHTS
from corequant_transformers.model.layouts import (
    check_blocks,
    check_description,
    check_places,
    standardize,
)
from corequant_transformers.model.parts import codes_of_embedding, tie
from corequant_transformers.model.quantized_embedding import QuantizedEmbedding, without_rows
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.surroundings import check_finite
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import plan_model
from corequant_transformers.transforms.matrices import restructure

__all__ = ["Assembly"]

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPES = {
    **{"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64},
    **_FLOATS,
}


class _Awaited(torch.nn.Module):
    """A module with a quantized weight before its codes are there: what is stored are buffers."""

    weight: torch.Tensor

    def __init__(self, matrix: MatrixPlan, stored: Mapping[str, RawTensor]) -> None:
        super().__init__()
        self._matrix, self._stored = matrix, tuple(stored)
        for name, tensor in stored.items():
            dtype = _DTYPES.get(tensor.dtype)
            if dtype is None:
                raise CheckpointError(f"{matrix.name}.{name} has the dtype {tensor.dtype}")
            self.register_buffer(name, torch.empty(tensor.shape, dtype=dtype, device="meta"))

    def settle(self, quantized: QuantizedTensor | None = None) -> None:
        """Become the module of the stored arrays, or of those of a module that it is tied to."""
        layer: Any = self
        matrix, weight = self._matrix, self.weight
        if quantized is None:
            own = {f"{matrix.name}.{name}": getattr(self, name) for name in self._stored}
            arrays = {k: array_of(k, t.cpu(), WEIGHTS, matrix) for k, t in own.items()}
            quantized = from_arrays(matrix.name, arrays, matrix.weights, matrix.shape)
        made = self._made(matrix, quantized)
        for name in (*self._stored, "_matrix", "_stored"):
            delattr(self, name)
        # Still the same object, so that what was hooked onto it stays.
        layer.__class__ = type(made)
        layer.__dict__.update({k: v for k, v in vars(made).items() if not k.startswith("_")})
        layer.decode(weight.device, weight.dtype)

    def _made(self, matrix: MatrixPlan, quantized: QuantizedTensor) -> Any:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Describe the module in one line."""
        return "not loaded yet"


class _AwaitedLinear(_Awaited):
    # What places a layer on its device wraps this before the codes are there.
    forward = QuantizedLinear.forward

    def __init__(self, matrix: MatrixPlan, stored: Mapping[str, RawTensor], module: Any) -> None:
        super().__init__(matrix, stored)
        self.register_buffer("bias", None if module.bias is None else module.bias.detach())
        # In the dtype that Transformers was asked for, which is torch's own by default meanwhile.
        self.register_buffer("weight", torch.empty(matrix.shape, device="meta"), persistent=False)

    def _made(self, matrix: MatrixPlan, quantized: QuantizedTensor) -> Any:
        return QuantizedLinear.of(matrix, quantized, self._buffers["bias"])


class _AwaitedEmbedding(_Awaited):
    forward = QuantizedEmbedding.forward

    def __init__(self, matrix: MatrixPlan, stored: Mapping[str, RawTensor], module: Any) -> None:
        super().__init__(matrix, stored)
        self.table = without_rows(module)
        self.table.weight = torch.empty(matrix.shape, device="meta")

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        rows: torch.Tensor = self.table.weight
        return rows

    def _made(self, matrix: MatrixPlan, quantized: QuantizedTensor) -> Any:
        return QuantizedEmbedding(quantized, self.table, matrix.name)


class Assembly:
    """Turns one model of Transformers into a quantized one while it is loaded.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As its class makes it, on the meta device; changed in place.
    settings : mapping
        Fields of its ``quantization_config``.
    files : sequence of str, optional
        Files of weights that Transformers found.

    Raises
    ------
    ArchitectureError
        If the model is not a causal language model, or its architecture is unknown.
    CheckpointError
        If files are missing or don't belong to the model.
    """

    def __init__(
        self, model: Any, settings: Mapping[str, Any], files: Sequence[str] | None
    ) -> None:
        names = [Path(file).name for file in files or ()]
        if names != [WEIGHTS] or files is None:
            raise CheckpointError(
                f"a model that corequant quantized must be loaded from {WEIGHTS}, got "
                f"{', '.join(names) or 'a state dict'}"
            )
        self._file = Path(files[0])
        self._comparison = Comparison(files, required=True)
        described = read_description(settings, model.config, self._file.with_name("config.json"))
        try:
            plan = plan_model(model.config, Recipe.from_dict(settings["recipe"]), described)
        except (RecipeError, TypeError) as error:
            raise CheckpointError(
                f"recipe of {self._file.with_name('config.json')}: {error}"
            ) from error
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        if tied != plan.tied and not plan.architecture.enclosed:
            raise CheckpointError(
                f"tie_word_embeddings of {self._file.with_name('config.json')} must be false, got "
                "true: the recipe gives the head a matrix of its own"
            )
        check_places(model, plan.architecture)
        check_blocks(model, plan.architecture, plan.dimensions.blocks)
        standardize(model, plan)
        check_description(model, plan)
        restructure(model, plan)
        self._plan = plan
        self._place_layers(model)

    def _place_layers(self, model: Any) -> None:
        file = TensorFile(self._file)
        stored = {name: file.read(name) for name in file.names}
        for matrix in self._plan.quantized:
            prefix = f"{matrix.name}."
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in stored.items()
                if name.startswith(f"{prefix}weight_")
            }
            awaited = _AwaitedEmbedding if matrix.role == "embedding" else _AwaitedLinear
            module = model.get_submodule(matrix.name)
            model.set_submodule(matrix.name, awaited(matrix, own, module))
        if self._shares_codes:
            # Not Transformers' affair: there is no parameter to be tied.
            model.all_tied_weights_keys = {}
        self._check_names(model, stored)

    @property
    def _shares_codes(self) -> bool:
        return self._plan.tied and self._plan.matrices[-1].quantized

    def _check_names(self, model: Any, stored: Mapping[str, RawTensor]) -> None:
        state = model.state_dict()
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        for name in sorted(set(state) ^ set(stored)):
            if name in stored:
                raise CheckpointError(f"{self._file} has an unexpected tensor {name}")
            if name not in tied:
                raise CheckpointError(f"{self._file} lacks the tensor {name}")
        codes = tuple(f"{m.name}.weight_" for m in self._plan.quantized)
        for name, tensor in stored.items():
            if tuple(state[name].shape) != tuple(tensor.shape):
                raise CheckpointError(
                    f"{name} of {self._file} must have shape {tuple(state[name].shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
            if not name.startswith(codes) and tensor.dtype not in _FLOATS:
                raise CheckpointError(f"{name} of {self._file} must be float, got {tensor.dtype}")

    @torch.no_grad()
    def finish(self, model: Any) -> None:
        """Decode the layers, and look at what was read.

        Raises
        ------
        CheckpointError
            If a file isn't as it was written, or its numbers can't be those of a model.
        NonFiniteError
            If a parameter holds NaN or infinity, such as after a cast to float16.
        """
        for matrix in self._plan.kept:
            layer: Any = model.get_submodule(matrix.name)
            layer.settle()
        if self._shares_codes:
            head: Any = model.get_submodule(self._plan.architecture.head)
            head.settle(codes_of_embedding(model, self._plan))
            tie(model, self._plan)
        self._comparison.finish()
        for name, tensor in model.named_parameters():
            check_finite(name, tensor)
        for matrix in self._plan.quantized:
            check_finite(f"{matrix.name}.weight", model.get_submodule(matrix.name).weight)
        model.requires_grad_(False)
        keep_architecture(model, self._plan.architecture)
        model.save_pretrained = Saving.of(model, self._plan, self._file.parent)

"""Quantizers and weights in the words of compressed-tensors checkpoints.

Which format a pair of quantizers becomes:

- integers: ``int-quantized`` (codes as they are) for 8 bits with 8-bit activations, or where they
  are to be ``whole`` bytes, otherwise ``pack-quantized``, also for int4 weights with int4 or int8
  activations, since that is what vLLM reads;
- ``mxfp4``: ``mxfp4-pack-quantized``; ``nvfp4``: ``nvfp4-pack-quantized``.

Only fields that compressed-tensors 0.17 to 0.20 know are written.

Source: ``quantization_config`` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from corequant.errors import CheckpointError, SpecError
from corequant.formats import FormatKind
from corequant.quantization import QuantizedTensor
from corequant.specs import (
    Granularity,
    QuantSpec,
    ScaleFormat,
    ScaleRounding,
    ScaleSearch,
    presets,
    qparams_shape,
)
from corequant.storage.arrays import Layout, from_arrays, layout_of, to_arrays
from corequant.storage.tensor_file import RawTensor

__all__ = ["Scheme"]

_FP4 = {
    (presets[name].format, presets[name].granularity, presets[name].group_size): (name, dtype)
    for name, dtype in (("mxfp4", "torch.uint8"), ("nvfp4", "torch.float8_e4m3fn"))
}
_SCALES = {kind: kind.tag for kind in ScaleFormat if kind.tag}
_STRATEGIES = {
    Granularity.TENSOR: "tensor",
    Granularity.CHANNEL: "channel",
    Granularity.TOKEN: "token",
    Granularity.GROUP: "group",
    Granularity.TENSOR_GROUP: "tensor_group",
}


@dataclass(frozen=True)
class Scheme:
    """Quantizers of weights and of what they are multiplied by, as a checkpoint stores them.

    Attributes
    ----------
    weights : QuantSpec
    activations : QuantSpec, optional
        Chosen at run time; None leaves them in float.
    whole : bool
        Store codes of integers as int8 under the name ``weight``, whatever their bits and the
        activations are: Transformers ties two matrices by that name, and needs it in embeddings.

    Raises
    ------
    SpecError
        If compressed-tensors has no format for them; the message says which part it lacks.

    Examples
    --------
    >>> from corequant.storage.compressed_tensors import Scheme
    >>> from corequant.specs import QuantSpec
    >>> Scheme(QuantSpec.parse("int8:channel"), QuantSpec.parse("int8:token")).format
    'int-quantized'
    """

    weights: QuantSpec
    activations: QuantSpec | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        """Refuse what no format holds."""
        self.config([])

    @property
    def format(self) -> str:
        """Name of the format that the weights are stored in."""
        if _fp4(self.weights) is not None:
            return f"{_FP4[_key(self.weights)][0]}-pack-quantized"
        eight = self.activations is not None and self.activations.format.bits == 8
        eight = eight and self.weights.format.bits == 8
        return "int-quantized" if eight or self.whole else "pack-quantized"

    @property
    def dtype(self) -> str:
        """Dtype that the model computes in, of which the scales are numbers."""
        if _fp4(self.weights) is not None:
            # Readers decode four-bit floats to this type only.
            return "BF16"
        return _SCALES[self.weights.scale_format]

    def config(self, targets: Sequence[str]) -> dict[str, Any]:
        """Return the config group: quantizers of the layers that ``targets`` names."""
        activations = None
        if self.activations is not None:
            floats = _fp4(self.weights) is not None
            if floats and _key(self.activations) != _key(self.weights):
                raise SpecError(
                    f"activations must be none or {_FP4[_key(self.weights)][0]} with weights of "
                    f"{self.weights}, got {self.activations}"
                )
            _check_run_time(self.activations)
            activations = _arguments(self.activations, "activations")
            local = self.activations.granularity is Granularity.TENSOR_GROUP
            activations["dynamic"] = "local" if local else True
        return {
            "targets": list(targets),
            "format": self.format,
            "weights": {**_arguments(self.weights, "weights"), "dynamic": False},
            "input_activations": activations,
            "output_activations": None,
        }

    def tensors(self, name: str, quantized: QuantizedTensor) -> dict[str, RawTensor]:
        """Return a weight's tensors for a file.

        Parameters
        ----------
        name : str
            Path of the module that the weight belongs to.
        quantized : QuantizedTensor
            Matrix (out_features, in_features) of this scheme's spec, NumPy arrays.

        Raises
        ------
        ValueError
            If a scale is not a number of the scales' format.
        """
        arrays = to_arrays(name, quantized)
        key = f"{name}.weight_scale"
        scales = RawTensor.of(arrays.pop(key), _SCALES[self.weights.scale_format])
        if self.weights.scale_format is ScaleFormat.BFLOAT16 and not np.array_equal(
            scales.array(), quantized.scales
        ):
            raise ValueError(f"scales of {name} must be numbers of bfloat16")
        if self.format == "int-quantized":
            arrays = {f"{name}.weight": np.ascontiguousarray(quantized.codes, np.int8)}
        return {key: scales, **{k: RawTensor.of(a) for k, a in sorted(arrays.items())}}

    def layout(self, name: str, shape: tuple[int, int]) -> Layout:
        """Return dtypes and shapes of what ``tensors`` would return for a weight of a shape."""
        found = layout_of(name, shape, self.weights)
        key = f"{name}.weight_scale"
        found[key] = (str(_SCALES[self.weights.scale_format]), found[key][1])
        if self.format == "int-quantized":
            found = {key: found[key], f"{name}.weight": ("I8", shape)}
        return found

    def read(
        self, name: str, tensors: Mapping[str, RawTensor], shape: tuple[int, int]
    ) -> QuantizedTensor:
        """Return the weight that ``tensors`` gave, everything about it checked.

        Raises
        ------
        CheckpointError
            If a tensor is missing or of another dtype or shape, or a value is invalid.
        """
        key = f"{name}.weight_scale"
        wanted = _SCALES[self.weights.scale_format]
        if key not in tensors:
            raise CheckpointError(f"the tensor {key} is missing")
        if tensors[key].dtype != wanted:
            raise CheckpointError(f"{key} must be {wanted}, got {tensors[key].dtype}")
        arrays = {k: t.array() for k, t in tensors.items()}
        if self.format == "int-quantized":
            codes = arrays.pop(f"{name}.weight", None)
            if codes is None or codes.shape != shape or codes.dtype != np.int8:
                raise CheckpointError(f"{name}.weight must be int8 of shape {shape}")
            scales = arrays[key].astype(np.float32)
            parts = qparams_shape(shape, self.weights)
            if scales.shape != parts or not (np.isfinite(scales) & (scales > 0)).all():
                raise CheckpointError(f"{key} must be positive, finite and of shape {parts}")
            return QuantizedTensor(codes, scales, None, self.weights)
        return from_arrays(name, arrays, self.weights, shape)


def _key(spec: QuantSpec) -> tuple[Any, ...]:
    return spec.format, spec.granularity, spec.group_size


def _fp4(spec: QuantSpec) -> str | None:
    return _FP4[_key(spec)][1] if _key(spec) in _FP4 else None


def _check_run_time(spec: QuantSpec) -> None:
    """Refuse activations whose scales readers would choose by another rule."""
    rule = ScaleRounding.EVEN if spec.scale_format is ScaleFormat.E8M0 else ScaleRounding.NEAREST
    wide = spec.scale_format in (ScaleFormat.E8M0, ScaleFormat.E4M3, ScaleFormat.FLOAT32)
    if spec.scale_search is not ScaleSearch.ABSMAX or spec.scale_rounding is not rule or not wide:
        raise SpecError(
            "readers choose the scales of activations from the largest magnitude, those of mxfp4 "
            f"by the rule 'even'; write mxfp4:even or leave the search out, got {spec}"
        )


def _arguments(spec: QuantSpec, what: str) -> dict[str, Any]:
    common = {
        "num_bits": spec.format.bits,
        "symmetric": spec.symmetric,
        "strategy": _STRATEGIES[spec.granularity],
        "group_size": spec.group_size,
    }
    if (scale := _fp4(spec)) is not None:
        return {**common, "type": "float", "scale_dtype": scale}
    form = spec.format
    whole = form.kind is FormatKind.INTEGER and form.signed and not form.fraction_bits
    weights = what == "weights"
    granularities = (
        (Granularity.CHANNEL, Granularity.GROUP)
        if weights
        else (Granularity.TOKEN, Granularity.GROUP)
    )
    if not whole or spec.granularity not in granularities or spec.scale_format not in _SCALES:
        raise SpecError(
            f"compressed-tensors holds {what} of mxfp4, nvfp4, and of int2 to int8 by "
            f"{' or '.join(g.value for g in granularities)}, got {spec}"
        )
    if weights and not spec.symmetric:
        raise SpecError(
            f"weights must be symmetric, got {spec}: Transformers 5.23 and 5.24 can't load packed "
            "zero points"
        )
    return {**common, "type": "int"}

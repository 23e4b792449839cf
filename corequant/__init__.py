"""corequant: permute, rotate, quantize.

The numerical core of post-training quantization with block rotations, on plain arrays.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from corequant._dispatch import available_backends
from corequant.calibration import ActivationStats
from corequant.errors import (
    AccumulatorError,
    ArchitectureError,
    BackendError,
    BlockSizeError,
    CalibrationError,
    CheckpointError,
    CorequantError,
    HadamardOrderError,
    HessianError,
    NonFiniteError,
    OutputError,
    PermutationError,
    RecipeError,
    ShapeError,
    SpecError,
    VerificationError,
)
from corequant.formats import NumberFormat, find_format, formats
from corequant.hadamard import hadamard_factors, hadamard_matrix, valid_block_sizes
from corequant.permutation import (
    absmax,
    energydiff,
    identity_permutation,
    invert_permutation,
    massdiff,
    random_permutation,
    zigzag,
)
from corequant.quantization import (
    QuantizedTensor,
    choose_global_scale,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from corequant.rotation import block_hadamard, random_signs
from corequant.specs import Granularity, QuantSpec, ScaleFormat, ScaleRounding, ScaleSearch, presets

if TYPE_CHECKING:
    from corequant.casting import decode, encode
    from corequant.diagnostics import (
        block_mass,
        load_balance,
        mass_concentration,
        outlier_bounds,
        probable_outlier_bounds,
    )
    from corequant.equalization import correct_bias, cross_layer_scales, smoothquant_scales
    from corequant.fusion import rotate_fake_quantize, rotate_quantize
    from corequant.merging import fold_norm, merge_factors, merge_permutation, merge_rotation
    from corequant.packed import (
        PackedTensor,
        dequantize_packed,
        pack_quantized,
        quantize_packed,
        unpack_quantized,
    )
    from corequant.packing import pack, pack_bytes, unpack, unpack_bytes
    from corequant.ranges import rangediff, sign_descent
    from corequant.rounding import (
        AccumulatorSpec,
        Certificate,
        RoundedTensor,
        RoundingReport,
        accumulator_bits,
        certify,
        learned_rounding,
        reconstruction_loss,
        round_to_nearest,
    )
    from corequant.rounding.gpfq import gpfq
    from corequant.rounding.gptq import gptq
    from corequant.rounding.magr import magr
    from corequant.rounding.qronos import qronos

# Imported when first asked for: together they would double the time that importing corequant takes.
_LAZY = {
    "AccumulatorSpec": "corequant.rounding",
    "Certificate": "corequant.rounding",
    "PackedTensor": "corequant.packed",
    "RoundedTensor": "corequant.rounding",
    "RoundingReport": "corequant.rounding",
    "accumulator_bits": "corequant.rounding",
    "block_mass": "corequant.diagnostics",
    "certify": "corequant.rounding",
    "correct_bias": "corequant.equalization",
    "cross_layer_scales": "corequant.equalization",
    "decode": "corequant.casting",
    "dequantize_packed": "corequant.packed",
    "encode": "corequant.casting",
    "fold_norm": "corequant.merging",
    "gpfq": "corequant.rounding",
    "gptq": "corequant.rounding",
    "learned_rounding": "corequant.rounding",
    "load_balance": "corequant.diagnostics",
    "magr": "corequant.rounding",
    "mass_concentration": "corequant.diagnostics",
    "merge_factors": "corequant.merging",
    "merge_permutation": "corequant.merging",
    "merge_rotation": "corequant.merging",
    "outlier_bounds": "corequant.diagnostics",
    "pack": "corequant.packing",
    "pack_bytes": "corequant.packing",
    "pack_quantized": "corequant.packed",
    "probable_outlier_bounds": "corequant.diagnostics",
    "qronos": "corequant.rounding",
    "quantize_packed": "corequant.packed",
    "rangediff": "corequant.ranges",
    "reconstruction_loss": "corequant.rounding",
    "rotate_fake_quantize": "corequant.fusion",
    "rotate_quantize": "corequant.fusion",
    "round_to_nearest": "corequant.rounding",
    "sign_descent": "corequant.ranges",
    "smoothquant_scales": "corequant.equalization",
    "unpack": "corequant.packing",
    "unpack_bytes": "corequant.packing",
    "unpack_quantized": "corequant.packed",
}

__all__ = [
    "AccumulatorError",
    "AccumulatorSpec",
    "ActivationStats",
    "ArchitectureError",
    "BackendError",
    "BlockSizeError",
    "CalibrationError",
    "Certificate",
    "CheckpointError",
    "CorequantError",
    "Granularity",
    "HadamardOrderError",
    "HessianError",
    "NonFiniteError",
    "NumberFormat",
    "OutputError",
    "PackedTensor",
    "PermutationError",
    "QuantSpec",
    "QuantizedTensor",
    "RecipeError",
    "RoundedTensor",
    "RoundingReport",
    "ScaleFormat",
    "ScaleRounding",
    "ScaleSearch",
    "ShapeError",
    "SpecError",
    "VerificationError",
    "absmax",
    "accumulator_bits",
    "available_backends",
    "block_hadamard",
    "block_mass",
    "certify",
    "choose_global_scale",
    "choose_qparams",
    "correct_bias",
    "cross_layer_scales",
    "decode",
    "dequantize",
    "dequantize_packed",
    "encode",
    "energydiff",
    "fake_quantize",
    "find_format",
    "fold_norm",
    "formats",
    "gpfq",
    "gptq",
    "hadamard_factors",
    "hadamard_matrix",
    "identity_permutation",
    "invert_permutation",
    "learned_rounding",
    "load_balance",
    "magr",
    "mass_concentration",
    "massdiff",
    "merge_factors",
    "merge_permutation",
    "merge_rotation",
    "outlier_bounds",
    "pack",
    "pack_bytes",
    "pack_quantized",
    "presets",
    "probable_outlier_bounds",
    "qronos",
    "quantize",
    "quantize_packed",
    "random_permutation",
    "random_signs",
    "rangediff",
    "reconstruction_loss",
    "rotate_fake_quantize",
    "rotate_quantize",
    "round_to_nearest",
    "sign_descent",
    "smoothquant_scales",
    "unpack",
    "unpack_bytes",
    "unpack_quantized",
    "valid_block_sizes",
    "zigzag",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'corequant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

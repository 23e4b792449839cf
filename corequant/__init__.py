"""corequant: permute, rotate, quantize.

The numerical core of post-training quantization with block rotations, on plain arrays.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from corequant._cpu import forks
from corequant.errors import (
    AccumulatorError,
    ArchitectureError,
    BackendError,
    BlockSizeError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    CorequantError,
    HadamardOrderError,
    HessianError,
    MissingPackageError,
    NonFiniteError,
    OutputError,
    PermutationError,
    RecipeError,
    RunError,
    ShapeError,
    SpecError,
    TaskError,
    VerificationError,
)
from corequant.formats import NumberFormat, find_format, formats

if TYPE_CHECKING:
    __version__: str
    from corequant._dispatch import available_backends
    from corequant.calibration import ActivationStats
    from corequant.casting import decode, encode
    from corequant.diagnostics import (
        block_mass,
        load_balance,
        mass_concentration,
        outlier_bounds,
        probable_outlier_bounds,
    )
    from corequant.equalization import (
        balanced_scales,
        correct_bias,
        cross_layer_scales,
        smoothquant_scales,
    )
    from corequant.exact import accumulator_bits
    from corequant.fusion import rotate_fake_quantize, rotate_quantize
    from corequant.hadamard import hadamard_factors, hadamard_matrix, valid_block_sizes
    from corequant.merging import (
        fold_norm,
        fold_norm_bias,
        merge_centering,
        merge_factors,
        merge_permutation,
        merge_rotation,
    )
    from corequant.packing.codes import pack, pack_bytes, unpack, unpack_bytes
    from corequant.packing.tensors import (
        PackedTensor,
        dequantize_packed,
        pack_quantized,
        quantize_packed,
        unpack_quantized,
    )
    from corequant.permutation import (
        absmax,
        energydiff,
        identity_permutation,
        invert_permutation,
        massdiff,
        random_permutation,
        repeat_permutation,
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
    from corequant.range_search import rangediff, sign_descent
    from corequant.rotation import block_hadamard, random_signs
    from corequant.rounding import (
        AccumulatorSpec,
        Allocation,
        Certificate,
        RoundedTensor,
        RoundingReport,
        allocate_bits,
        certify,
        fit_scales,
        learned_rounding,
        reconstruction_loss,
        round_to_nearest,
    )
    from corequant.rounding.binary import Additive, Partition, arb, billm
    from corequant.rounding.codebooks import (
        Codebook,
        CodedWeight,
        CodingReport,
        ColumnScaled,
        EntropyCoded,
        KeptOutliers,
        LevelTable,
        RoundedWeight,
        SharedCodebook,
        SparseOutliers,
        kmeans_levels,
        kmeans_table,
        lloyd_max,
        load_coded,
    )
    from corequant.rounding.codebooks.claq import ClaqReport, claq
    from corequant.rounding.codebooks.skim import SkimReport, skim
    from corequant.rounding.codebooks.watersic import watersic
    from corequant.rounding.gpfq import gpfq
    from corequant.rounding.gptq import gptq
    from corequant.rounding.magr import magr
    from corequant.rounding.qronos import qronos
    from corequant.specs import (
        Granularity,
        QuantSpec,
        ScaleFormat,
        ScaleRounding,
        ScaleSearch,
        presets,
    )

# Imported when first asked for, so that importing corequant costs next to nothing.
_PARTS = {
    "corequant._dispatch": "available_backends",
    "corequant.calibration": "ActivationStats",
    "corequant.casting": "decode encode",
    "corequant.diagnostics": (
        "block_mass load_balance mass_concentration outlier_bounds probable_outlier_bounds"
    ),
    "corequant.equalization": "balanced_scales correct_bias cross_layer_scales smoothquant_scales",
    "corequant.exact": "accumulator_bits",
    "corequant.fusion": "rotate_fake_quantize rotate_quantize",
    "corequant.hadamard": "hadamard_factors hadamard_matrix valid_block_sizes",
    "corequant.merging": (
        "fold_norm fold_norm_bias merge_centering merge_factors merge_permutation merge_rotation"
    ),
    "corequant.packing.tensors": (
        "PackedTensor dequantize_packed pack_quantized quantize_packed unpack_quantized"
    ),
    "corequant.packing.codes": "pack pack_bytes unpack unpack_bytes",
    "corequant.permutation": (
        "absmax energydiff identity_permutation invert_permutation massdiff random_permutation "
        "repeat_permutation zigzag"
    ),
    "corequant.quantization": (
        "QuantizedTensor choose_global_scale choose_qparams dequantize fake_quantize quantize"
    ),
    "corequant.range_search": "rangediff sign_descent",
    "corequant.rotation": "block_hadamard random_signs",
    "corequant.rounding": (
        "AccumulatorSpec Allocation Certificate RoundedTensor RoundingReport allocate_bits certify "
        "fit_scales learned_rounding reconstruction_loss round_to_nearest"
    ),
    "corequant.rounding.binary": "Additive Partition arb billm",
    "corequant.rounding.codebooks": (
        "Codebook CodedWeight CodingReport ColumnScaled EntropyCoded KeptOutliers LevelTable "
        "RoundedWeight SharedCodebook SparseOutliers kmeans_levels kmeans_table lloyd_max "
        "load_coded"
    ),
    "corequant.rounding.codebooks.claq": "ClaqReport claq",
    "corequant.rounding.codebooks.skim": "SkimReport skim",
    "corequant.rounding.codebooks.watersic": "watersic",
    "corequant.rounding.gpfq": "gpfq",
    "corequant.rounding.gptq": "gptq",
    "corequant.rounding.magr": "magr",
    "corequant.rounding.qronos": "qronos",
    "corequant.specs": "Granularity QuantSpec ScaleFormat ScaleRounding ScaleSearch presets",
}
_LAZY = {name: part for part, names in _PARTS.items() for name in names.split()}

__all__ = [
    "AccumulatorError",
    "AccumulatorSpec",
    "ActivationStats",
    "Additive",
    "Allocation",
    "ArchitectureError",
    "BackendError",
    "BlockSizeError",
    "BudgetError",
    "CalibrationError",
    "Certificate",
    "CheckpointError",
    "ClaqReport",
    "Codebook",
    "CodedWeight",
    "CodingReport",
    "ColumnScaled",
    "CorequantError",
    "EntropyCoded",
    "Granularity",
    "HadamardOrderError",
    "HessianError",
    "KeptOutliers",
    "LevelTable",
    "MissingPackageError",
    "NonFiniteError",
    "NumberFormat",
    "OutputError",
    "PackedTensor",
    "Partition",
    "PermutationError",
    "QuantSpec",
    "QuantizedTensor",
    "RecipeError",
    "RoundedTensor",
    "RoundedWeight",
    "RoundingReport",
    "RunError",
    "ScaleFormat",
    "ScaleRounding",
    "ScaleSearch",
    "ShapeError",
    "SharedCodebook",
    "SkimReport",
    "SparseOutliers",
    "SpecError",
    "TaskError",
    "VerificationError",
    "absmax",
    "accumulator_bits",
    "allocate_bits",
    "arb",
    "available_backends",
    "balanced_scales",
    "billm",
    "block_hadamard",
    "block_mass",
    "certify",
    "choose_global_scale",
    "choose_qparams",
    "claq",
    "correct_bias",
    "cross_layer_scales",
    "decode",
    "dequantize",
    "dequantize_packed",
    "encode",
    "energydiff",
    "fake_quantize",
    "find_format",
    "fit_scales",
    "fold_norm",
    "fold_norm_bias",
    "formats",
    "gpfq",
    "gptq",
    "hadamard_factors",
    "hadamard_matrix",
    "identity_permutation",
    "invert_permutation",
    "kmeans_levels",
    "kmeans_table",
    "learned_rounding",
    "lloyd_max",
    "load_balance",
    "load_coded",
    "magr",
    "mass_concentration",
    "massdiff",
    "merge_centering",
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
    "repeat_permutation",
    "rotate_fake_quantize",
    "rotate_quantize",
    "round_to_nearest",
    "sign_descent",
    "skim",
    "smoothquant_scales",
    "unpack",
    "unpack_bytes",
    "unpack_quantized",
    "valid_block_sizes",
    "watersic",
    "zigzag",
]


# From the first import on: what is loaded later may be under way when another thread forks.
forks.register()

if not TYPE_CHECKING:  # with it, any name would have a type

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value: Any = importlib.import_module("corequant.storage.files").version_of("corequant")
        elif name in _LAZY:
            value = getattr(importlib.import_module(_LAZY[name]), name)
        else:
            raise AttributeError(f"module 'corequant' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""corequant: permute, rotate, quantize.

The numerical core of post-training quantization with block rotations, on plain arrays.
"""

from corequant._dispatch import available_backends
from corequant.calibration import ActivationStats
from corequant.diagnostics import block_mass, mass_concentration, outlier_bounds
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
from corequant.merging import fold_norm, merge_permutation, merge_rotation
from corequant.packing import pack, unpack
from corequant.permutation import (
    absmax,
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
from corequant.rounding import (
    AccumulatorSpec,
    Certificate,
    RoundedTensor,
    RoundingReport,
    accumulator_bits,
    certify,
    gpfq,
    gptq,
    qronos,
    reconstruction_loss,
    round_to_nearest,
)
from corequant.specs import (
    Granularity,
    QuantSpec,
    ScaleFormat,
    ScaleRounding,
    ScaleSearch,
    presets,
)

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
    "dequantize",
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
    "mass_concentration",
    "massdiff",
    "merge_permutation",
    "merge_rotation",
    "outlier_bounds",
    "pack",
    "presets",
    "qronos",
    "quantize",
    "random_permutation",
    "random_signs",
    "reconstruction_loss",
    "round_to_nearest",
    "unpack",
    "valid_block_sizes",
    "zigzag",
]

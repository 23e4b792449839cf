"""corequant: permute, rotate, quantize.

The numerical core of post-training quantization with block rotations, on plain arrays.
"""

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
from corequant.equalization import smoothquant_scales
from corequant.errors import (
    ArchitectureError,
    BackendError,
    BlockSizeError,
    CalibrationError,
    CheckpointError,
    CorequantError,
    HadamardOrderError,
    NonFiniteError,
    OutputError,
    PermutationError,
    RecipeError,
    ShapeError,
    SpecError,
    VerificationError,
)
from corequant.formats import NumberFormat, find_format, formats
from corequant.fusion import rotate_fake_quantize, rotate_quantize
from corequant.hadamard import hadamard_factors, hadamard_matrix, valid_block_sizes
from corequant.merging import fold_norm, merge_factors, merge_permutation, merge_rotation
from corequant.packed import (
    PackedTensor,
    dequantize_packed,
    pack_quantized,
    quantize_packed,
    unpack_quantized,
)
from corequant.packing import pack, pack_bytes, unpack, unpack_bytes
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
from corequant.ranges import rangediff, sign_descent
from corequant.rotation import block_hadamard, random_signs
from corequant.rounding import round_to_nearest
from corequant.specs import (
    Granularity,
    QuantSpec,
    ScaleFormat,
    ScaleRounding,
    ScaleSearch,
    presets,
)

__all__ = [
    "ActivationStats",
    "ArchitectureError",
    "BackendError",
    "BlockSizeError",
    "CalibrationError",
    "CheckpointError",
    "CorequantError",
    "Granularity",
    "HadamardOrderError",
    "NonFiniteError",
    "NumberFormat",
    "OutputError",
    "PackedTensor",
    "PermutationError",
    "QuantSpec",
    "QuantizedTensor",
    "RecipeError",
    "ScaleFormat",
    "ScaleRounding",
    "ScaleSearch",
    "ShapeError",
    "SpecError",
    "VerificationError",
    "absmax",
    "available_backends",
    "block_hadamard",
    "block_mass",
    "choose_global_scale",
    "choose_qparams",
    "decode",
    "dequantize",
    "dequantize_packed",
    "encode",
    "energydiff",
    "fake_quantize",
    "find_format",
    "fold_norm",
    "formats",
    "hadamard_factors",
    "hadamard_matrix",
    "identity_permutation",
    "invert_permutation",
    "load_balance",
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
    "quantize",
    "quantize_packed",
    "random_permutation",
    "random_signs",
    "rangediff",
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

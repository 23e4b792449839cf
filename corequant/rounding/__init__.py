"""Ways to round a weight: one method a module, each a pure function that returns codes."""

from corequant.rounding.accumulators import (
    AccumulatorSpec,
    Certificate,
    accumulator_bits,
    certify,
    integer_codes,
)
from corequant.rounding.gpfq import gpfq
from corequant.rounding.gptq import gptq
from corequant.rounding.nearest import round_to_nearest
from corequant.rounding.qronos import qronos
from corequant.rounding.report import RoundedTensor, RoundingReport, reconstruction_loss

__all__ = [
    "AccumulatorSpec",
    "Certificate",
    "RoundedTensor",
    "RoundingReport",
    "accumulator_bits",
    "certify",
    "gpfq",
    "gptq",
    "integer_codes",
    "qronos",
    "reconstruction_loss",
    "round_to_nearest",
]

"""Rounding methods for weights: a module each, pure functions that return codes."""

from corequant.rounding.accumulators import (
    AccumulatorSpec,
    Certificate,
    certify,
    integer_codes,
)
from corequant.rounding.allocation import Allocation, allocate_bits
from corequant.rounding.expectation import expected_losses, unpredicted
from corequant.rounding.fitting import fit_scales
from corequant.rounding.gpfq import gpfq
from corequant.rounding.gptq import gptq
from corequant.rounding.hessian import Damping
from corequant.rounding.learned import learned_rounding
from corequant.rounding.magr import magr
from corequant.rounding.methods import RoundingMethod, RoundingOptions, rounding_methods
from corequant.rounding.moments import InputMoments
from corequant.rounding.nearest import round_to_nearest
from corequant.rounding.problem import RoundedTensor, RoundingReport, reconstruction_loss
from corequant.rounding.qronos import qronos
from corequant.rounding.together import round_together

__all__ = [
    "AccumulatorSpec",
    "Allocation",
    "Certificate",
    "Damping",
    "InputMoments",
    "RoundedTensor",
    "RoundingMethod",
    "RoundingOptions",
    "RoundingReport",
    "allocate_bits",
    "certify",
    "expected_losses",
    "fit_scales",
    "gpfq",
    "gptq",
    "integer_codes",
    "learned_rounding",
    "magr",
    "qronos",
    "reconstruction_loss",
    "round_to_nearest",
    "round_together",
    "rounding_methods",
    "unpredicted",
]

"""corequant for Hugging Face models: plan, quantize, verify, save, load, evaluate.

Importing it patches Transformers: config and quantizer of compressed-tensors are replaced by ones
that rotate at run time, see ``exports.transformers_hook``.
"""

from corequant_transformers.architectures.known import Architecture, Experts, register
from corequant_transformers.calibration.choices import Calibration
from corequant_transformers.checkpoint.reader import load, load_tokenizer
from corequant_transformers.exports.targets import export
from corequant_transformers.exports.transformers_hook import install
from corequant_transformers.files.digests import check_digests
from corequant_transformers.inspection.html import write_report
from corequant_transformers.inspection.outliers import Inspection, inspect
from corequant_transformers.model.sources import Source
from corequant_transformers.model.text import Evaluation, evaluate, token_windows
from corequant_transformers.pipeline import Quantized, calibrate, plan, quantize
from corequant_transformers.planning.fates import fates
from corequant_transformers.planning.memory import limit_memory
from corequant_transformers.testing import tiny_model
from corequant_transformers.transforms.matrices import Choices
from corequant_transformers.transforms.verification import Trace, Verification, trace, verify

__all__ = [
    "Architecture",
    "Calibration",
    "Choices",
    "Evaluation",
    "Experts",
    "Inspection",
    "Quantized",
    "Source",
    "Trace",
    "Verification",
    "calibrate",
    "check_digests",
    "evaluate",
    "export",
    "fates",
    "inspect",
    "install",
    "limit_memory",
    "load",
    "load_tokenizer",
    "plan",
    "quantize",
    "register",
    "tiny_model",
    "token_windows",
    "trace",
    "verify",
    "write_report",
]

install()

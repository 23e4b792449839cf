"""corequant for Hugging Face models: plan, quantize, verify, save, load, evaluate."""

from corequant_transformers.architectures import Architecture, Experts, register
from corequant_transformers.budgets import fates, limit_memory
from corequant_transformers.checkpoint import load, load_tokenizer
from corequant_transformers.choosing import Calibration
from corequant_transformers.digests import check_digests
from corequant_transformers.exporting import export
from corequant_transformers.inspecting import Inspection, inspect
from corequant_transformers.online import install
from corequant_transformers.pipeline import Quantized, calibrate, plan, quantize
from corequant_transformers.reporting import write_report
from corequant_transformers.sources import Source
from corequant_transformers.testing import tiny_model
from corequant_transformers.texts import Evaluation, evaluate, token_windows
from corequant_transformers.transforming import Choices
from corequant_transformers.verifying import Trace, Verification, trace, verify

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

# Directories with run-time rotations load in Transformers from here on.
install()

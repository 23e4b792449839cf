"""corequant for Hugging Face models: plan, quantize, verify, save, load, evaluate.

Importing it patches Transformers: config and quantizer of compressed-tensors are replaced by ones
that rotate at run time, see ``exports.transformers_hook``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from corequant._validation import need_packages
from corequant_transformers.exports.arrival import install_when_imported

if TYPE_CHECKING:
    from corequant_transformers.architectures.description import Architecture, Variant
    from corequant_transformers.architectures.experts import Experts
    from corequant_transformers.architectures.files import read_architecture
    from corequant_transformers.architectures.known import register
    from corequant_transformers.architectures.latent import Latent
    from corequant_transformers.architectures.mixer import Mixer
    from corequant_transformers.architectures.where import Where
    from corequant_transformers.calibration.choices import Calibration
    from corequant_transformers.calibration.data.documents import Documents, read_documents
    from corequant_transformers.calibration.data.windows import Sample, sample_windows
    from corequant_transformers.checkpoint.reader import load, load_tokenizer
    from corequant_transformers.evaluation.divergence import Divergence
    from corequant_transformers.evaluation.measurement import Evaluation, evaluate
    from corequant_transformers.evaluation.results import TaskResult
    from corequant_transformers.evaluation.task_files import Task, read_task
    from corequant_transformers.evaluation.tasks import evaluate_tasks
    from corequant_transformers.exports.sizes import sizes
    from corequant_transformers.exports.targets import export
    from corequant_transformers.exports.transformers_hook import install
    from corequant_transformers.files.digests import check_digests
    from corequant_transformers.inspection.describe import Description, describe
    from corequant_transformers.inspection.html import write_report
    from corequant_transformers.inspection.layers import LayerError, LayerErrors, layer_errors
    from corequant_transformers.inspection.outliers import Inspection, inspect
    from corequant_transformers.inspection.runs import RunComparison, compare_runs
    from corequant_transformers.model.sources import Source
    from corequant_transformers.model.surroundings import limit_memory
    from corequant_transformers.model.text import token_windows
    from corequant_transformers.pipeline import Quantized, calibrate, plan, quantize
    from corequant_transformers.planning.fates import fates
    from corequant_transformers.testing import tiny_model
    from corequant_transformers.transforms.matrices import Choices
    from corequant_transformers.transforms.verification import Trace, Verification, trace, verify

# Imported when first asked for: torch and Transformers take seconds.
_PARTS = {
    "architectures.description": "Architecture Variant",
    "architectures.experts": "Experts",
    "architectures.files": "read_architecture",
    "architectures.known": "register",
    "architectures.latent": "Latent",
    "architectures.mixer": "Mixer",
    "architectures.where": "Where",
    "calibration.choices": "Calibration",
    "calibration.data.documents": "Documents read_documents",
    "calibration.data.windows": "Sample sample_windows",
    "checkpoint.reader": "load load_tokenizer",
    "evaluation.divergence": "Divergence",
    "evaluation.measurement": "Evaluation evaluate",
    "evaluation.results": "TaskResult",
    "evaluation.task_files": "Task read_task",
    "evaluation.tasks": "evaluate_tasks",
    "exports.sizes": "sizes",
    "exports.targets": "export",
    "exports.transformers_hook": "install",
    "files.digests": "check_digests",
    "inspection.describe": "Description describe",
    "inspection.html": "write_report",
    "inspection.layers": "LayerError LayerErrors layer_errors",
    "inspection.outliers": "Inspection inspect",
    "inspection.runs": "RunComparison compare_runs",
    "model.sources": "Source",
    "model.surroundings": "limit_memory",
    "model.text": "token_windows",
    "pipeline": "Quantized calibrate plan quantize",
    "planning.fates": "fates",
    "testing": "tiny_model",
    "transforms.matrices": "Choices",
    "transforms.verification": "Trace Verification trace verify",
}
_LAZY = {name: part for part, names in _PARTS.items() for name in names.split()}

__all__ = [
    "Architecture",
    "Calibration",
    "Choices",
    "Description",
    "Divergence",
    "Documents",
    "Evaluation",
    "Experts",
    "Inspection",
    "Latent",
    "LayerError",
    "LayerErrors",
    "Mixer",
    "Quantized",
    "RunComparison",
    "Sample",
    "Source",
    "Task",
    "TaskResult",
    "Trace",
    "Variant",
    "Verification",
    "Where",
    "calibrate",
    "check_digests",
    "compare_runs",
    "describe",
    "evaluate",
    "evaluate_tasks",
    "export",
    "fates",
    "inspect",
    "install",
    "layer_errors",
    "limit_memory",
    "load",
    "load_tokenizer",
    "plan",
    "quantize",
    "read_architecture",
    "read_documents",
    "read_task",
    "register",
    "sample_windows",
    "sizes",
    "tiny_model",
    "token_windows",
    "trace",
    "verify",
    "write_report",
]

need_packages(
    "corequant_transformers", "transformers", "torch", "ml_dtypes", "transformers", "safetensors"
)
install_when_imported()

if not TYPE_CHECKING:  # with it, any name would have a type

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'corequant_transformers' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"corequant_transformers.{_LAZY[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

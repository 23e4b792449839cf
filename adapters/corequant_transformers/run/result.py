"""The quantized model of a job that kept everything in memory."""

from __future__ import annotations

import copy
from typing import Any

from corequant_transformers.checkpoint.tensors import place_tensors
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.source_files import read_generation
from corequant_transformers.model.sources import Source
from corequant_transformers.run.job import Job
from corequant_transformers.transforms.norms import restructure

__all__ = ["assemble"]


def assemble(job: Job, origin: Any) -> Any:
    """Return the model that a job made of ``origin``, a source or a model."""
    model = job.parts.model
    standardize(model, job.plan)
    restructure(model, job.plan)
    tensors = {
        name: tensor
        for step in job.quantizing_steps
        for name, tensor in job.ledger.tensors(step).items()
    }
    model = place_tensors(model, job.plan, tensors, "the result").to(job.parts.device)
    # What the float model says about generating text.
    if isinstance(origin, Source):
        if not origin.is_gguf:
            model.generation_config = read_generation(origin.path) or getattr(
                model, "generation_config", None
            )
    elif getattr(origin, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(origin.generation_config)
    return model

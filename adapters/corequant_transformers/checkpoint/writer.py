"""Directories that hold a quantized model, written whole or not at all.

A directory holds ``corequant.safetensors`` (codes, scales and the float matrices), ``config.json``,
``float_config.json`` (the float model's config), ``recipe.toml``, ``report.json``, the tokenizer's
files and a model card. Its weights have a name of their own, and ``config.json`` has ``GUARD`` for
it: a reader that would ignore the run-time rotation finds no weights and stops, where it would
otherwise compute nonsense. With this package Transformers finds them, see ``quantizer``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from corequant.storage.files import json_text, version_of
from corequant_transformers.checkpoint.card import own_card
from corequant_transformers.checkpoint.origin import written_description
from corequant_transformers.checkpoint.tensors import check_writable, model_tensors
from corequant_transformers.files.atomic import compare
from corequant_transformers.files.digests import (
    DIGESTS,
    sealed_report,
    write_digests,
)
from corequant_transformers.files.marks import CARD, FORMAT_VERSION, GUARD, METHOD, WEIGHTS
from corequant_transformers.files.outputs import check_output, new_directory
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.rebuilding import check_rebuilt, rebuild
from corequant_transformers.model.source_files import copy_files
from corequant_transformers.model.surroundings import quiet_transformers
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.transforms.matrices import restructure

__all__ = ["save", "writing"]


def save(
    model: Any,
    plan: ModelPlan,
    output: str | Path,
    *,
    report: dict[str, Any],
    float_config: str,
    tokenizer: Any = None,
    copied_files: list[Path] | None = None,
    dtype: str = "float32",
) -> Path:
    """Write a quantized model to a new directory, read it back and compare, then give it its name.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With a ``QuantizedLinear`` for each quantized matrix of the plan.
    plan : ModelPlan
    output : str or Path
        A new or empty directory.
    report : dict
        Written to ``report.json``.
    float_config : str
        Text of the float model's ``config.json``.
    tokenizer : transformers tokenizer, optional
        Saved by its own ``save_pretrained`` if there are no files to copy.
    copied_files : list of Path, optional
        Copied byte for byte.
    dtype : str
        Dtype that Transformers computes in unless it is told another.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ArchitectureError
        If the model has something that loading wouldn't build from its config.
    OutputError
        If it can't be written, what was written doesn't read back equal, or the model has numbers
        that float32 doesn't hold. Nothing is left then.
    """
    tensors = model_tensors(model, plan)
    check_writable(tensors, plan)
    expected = rebuild(float_config)
    standardize(expected, plan)
    restructure(expected, plan)
    check_rebuilt(model, expected, {m.name for m in plan.quantized})
    name = type(model).__name__
    with writing(
        output,
        name,
        plan,
        report=report,
        float_config=float_config,
        tokenizer=tokenizer,
        copied_files=copied_files,
        dtype=dtype,
    ) as folder:
        generation = getattr(model, "generation_config", None)
        file = folder / "generation_config.json"
        # One that was made from the config says nothing that this doesn't.
        if generation is not None and not file.exists() and not generation._from_model_config:
            file.write_bytes(generation.to_json_string().encode())
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        compare(folder / WEIGHTS, tensors)
    return Path(output).absolute()


@contextmanager
def writing(
    output: str | Path,
    name: str,
    plan: ModelPlan,
    *,
    report: dict[str, Any],
    float_config: str,
    tokenizer: Any = None,
    copied_files: list[Path] | None = None,
    dtype: str = "float32",
    within: Path | None = None,
    complete: Callable[[Path], object] = lambda folder: None,
) -> Iterator[Path]:
    """Yield a new directory with all files but weights and report; it gets its name at the end.

    Parameters
    ----------
    output : str or Path
    name : str
        Name of the model's class.
    plan, report, float_config, tokenizer, copied_files, dtype
        As for ``save``.
    within : Path, optional
        Folder of the directory until it gets its name; that of ``output`` by default.
    complete : callable
        Called with the directory when all files are in it, before it gets its name.

    Raises
    ------
    OutputError
        If it can't be written. Nothing is left then.
    """
    target = check_output(output)
    with new_directory(target, within) as folder:
        copy_files(copied_files or [], folder)
        if tokenizer is not None and not copied_files:
            with quiet_transformers():
                tokenizer.save_pretrained(folder)
        (folder / "float_config.json").write_bytes(float_config.encode())
        (folder / "config.json").write_bytes(_config(name, plan, float_config, dtype).encode())
        (folder / "recipe.toml").write_bytes(plan.recipe.to_toml().encode())
        yield folder
        (folder / CARD).write_bytes(own_card(plan, report, folder / WEIGHTS).encode())
        (folder / "report.json").write_bytes(sealed_report(report, folder).encode())
        # The writer makes files that only their owner can read.
        (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)
        write_digests(folder)
        complete(folder)


def _config(name: str, plan: ModelPlan, float_config: str, dtype: str) -> str:
    own = ("torch_dtype", "quantization_config")
    values = {k: v for k, v in json.loads(float_config).items() if k not in own}
    if not plan.architecture.enclosed:
        values.update(tie_word_embeddings=plan.tied)
    values.update(
        architectures=[name],
        dtype=dtype,
        transformers_weights=GUARD,
        quantization_config={
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "corequant_version": version_of("corequant"),
            "load_with": "corequant_transformers.load",
            "digests": DIGESTS,
            "recipe": plan.recipe.to_dict(),
            **written_description(plan),
        },
    )
    return json_text(values)

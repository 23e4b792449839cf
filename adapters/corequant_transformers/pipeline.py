"""The main job: calibrate, permute, rotate, verify, quantize, save."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

import corequant as cq
from corequant.recipe import Recipe
from corequant.rounding import round_to_nearest
from corequant_transformers.capturing import collect_statistics
from corequant_transformers.checkpoint import check_output, save
from corequant_transformers.choosing import Calibration, choose, choose_block_sizes
from corequant_transformers.descriptions import check_described
from corequant_transformers.layers import QuantizedLinear
from corequant_transformers.layouts import check_modules, standardize, standardized
from corequant_transformers.planning import ModelPlan, plan_model
from corequant_transformers.sequential import round_blocks
from corequant_transformers.signs import choose_signs
from corequant_transformers.sources import Source
from corequant_transformers.texts import check_tokens, token_windows
from corequant_transformers.transforming import Choices, transform_model, untie
from corequant_transformers.verifying import Verification, trace, verify

__all__ = ["Calibration", "Quantized", "calibrate", "plan", "quantize"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)``."""

_VERIFIED_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Quantized:
    """What ``quantize`` made.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        With a ``QuantizedLinear`` for every quantized matrix.
    tokenizer : transformers tokenizer or None
    plan : ModelPlan
    choices : Choices
        Permutations and factors by region.
    verification : Verification
    report : dict
        Plain values: recipe, verification, a row per region and matrix, seconds, peak memory.
    float_config : str
        Text of the float model's ``config.json``.
    copied_files : list of Path
        Tokenizer files of the float model.
    """

    model: Any
    tokenizer: Any
    plan: ModelPlan
    choices: Choices
    verification: Verification
    report: dict[str, Any]
    float_config: str
    copied_files: list[Path]

    def save(self, output: str | Path) -> Path:
        """Write the model to a new or empty directory and return its path.

        Raises
        ------
        OutputError
            If it can't be written or doesn't read back equal; nothing is left there then.
        """
        return save(
            self.model,
            self.plan,
            output,
            report=self.report,
            float_config=self.float_config,
            tokenizer=self.tokenizer,
            copied_files=self.copied_files,
        )


def plan(model: str | Path | Any, recipe: Recipe) -> ModelPlan:
    """Say what ``quantize`` would do to a model, from its config alone.

    Parameters
    ----------
    model : str, Path or transformers.PreTrainedModel
    recipe : Recipe

    Returns
    -------
    ModelPlan

    Raises
    ------
    ArchitectureError, BlockSizeError, CheckpointError, HadamardOrderError
        If the model can't be read or the recipe can't be carried out on it.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> table = cqhf.plan(cqhf.tiny_model("llama"), Recipe(block_size=16))
    >>> table.online[0].name, table.online[0].input.rotation
    ('model.layers.0.mlp.down_proj', 16)
    """
    source = Source(model) if isinstance(model, str | Path) else None
    config = source.config() if source else cast(Any, model).config
    names = source.tensor_names if source else lambda: list(cast(Any, model).state_dict())
    check_described(config, names)
    return plan_model(config, recipe)


def calibrate(
    model: Any,
    recipe: Recipe,
    calibration: str | npt.NDArray[Any],
    tokenizer: Any = None,
    progress: Progress = lambda phase, done, total: None,
) -> Calibration:
    """Run a float model over calibration windows once; several recipes can use the result.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Untransformed, float.
    recipe : Recipe
        Says how many windows of how many tokens are taken from a text.
    calibration : str or numpy.ndarray (windows, length)
        Text, or token windows.
    tokenizer : transformers tokenizer, optional
        Needed for text.
    progress : callable

    Returns
    -------
    Calibration

    Raises
    ------
    CalibrationError
        If the text is empty or too short.
    NonFiniteError
        If an activation holds NaN or infinity.
    """
    if isinstance(calibration, str):
        if tokenizer is None:
            raise TypeError("tokenizer must be given with text, got None")
        tokens = token_windows(calibration, tokenizer, recipe.sequence_length, recipe.samples)
    else:
        tokens = check_tokens(calibration)
    table = plan_model(model.config, recipe)
    with standardized(model, table):
        check_modules(table, _shapes(model))
        gathered = collect_statistics(
            model, table, tokens, lambda done, total: progress("calibrate", done, total)
        )
        if recipe.sign_trials == 1 or not table.draw_signs():
            return gathered
        draw, losses = choose_signs(
            model, table, gathered.tokens, lambda done, total: progress("signs", done, total)
        )
    return replace(gathered, draw=draw, draw_losses=tuple(losses))


def quantize(
    model: str | Path | Any,
    recipe: Recipe,
    calibration: str | npt.NDArray[Any] | Calibration,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    executor: Executor | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Quantized:
    """Permute, rotate and quantize a model; verify it on the way; save it if asked.

    Parameters
    ----------
    model : str, Path or transformers.PreTrainedModel
        A Transformers directory, a GGUF file, or a float model, which is left as it is.
    recipe : Recipe
        What to do.
    calibration : str, numpy.ndarray (windows, length) or Calibration
        Text, token windows, or what ``calibrate`` returned for this very model.
    output : str or Path, optional
        A new or empty directory. Nothing is left there if anything fails.
    tokenizer : transformers tokenizer, optional
        Of a model that is given as an object; one on disk brings its own.
    executor : concurrent.futures.Executor, optional
        Rounds layers that read the same input at the same time, where the recipe's rounding looks
        at data.
    progress : callable
        Called as ``progress(phase, done, total)``.

    Returns
    -------
    Quantized

    Raises
    ------
    ArchitectureError, BlockSizeError, HadamardOrderError
        If the recipe can't be carried out on the model.
    CalibrationError
        If there is too little text.
    CheckpointError, OutputError
        If files can't be read or written.
    HessianError
        If a layer's inputs make no use of the recipe's rounding; names the layer.
    NonFiniteError
        If weights or activations hold NaN or infinity.
    VerificationError
        If the transformed model isn't the float model's equal before it is quantized.

    Notes
    -----
    The pipeline is that of PeRQ with merged full-vector rotations of the residual stream and of
    each value head, and a permuted block rotation at the input of each ``down_proj``, the only one
    that stays at run time. Source: arXiv 2601.22347, section 4; rotations as in QuaRot, arXiv
    2404.00456.

    Examples
    --------
    >>> import numpy as np, corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> tokens = np.arange(128).reshape(2, 64) % 100
    >>> result = cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=16), tokens)
    >>> result.verification.rotations_online
    2
    """
    started = time.monotonic()
    if output is not None:
        check_output(output)
    source = Source(model) if isinstance(model, str | Path) else None
    table = plan(model, recipe)
    if source is not None:
        tokenizer = source.tokenizer()
    if isinstance(calibration, str):
        # Too little text should be known before the model is loaded.
        if tokenizer is None:
            raise TypeError("tokenizer must be given with text, got None")
        calibration = token_windows(calibration, tokenizer, recipe.sequence_length, recipe.samples)
    if source is not None:
        progress("load", 0, 1)
        work = source.load()
        progress("load", 1, 1)
    else:
        work = copy.deepcopy(cast(Any, model)).float().eval().requires_grad_(False)
    float_config = _config_text(source, work)
    standardize(work, table)
    check_modules(table, _shapes(work))
    _check_weights(work)
    if not isinstance(calibration, Calibration):
        calibration = calibrate(work, recipe, calibration, progress=progress)

    recipe = choose_block_sizes(table, calibration)
    table = plan_model(work.config, recipe)
    choices, regions = choose(
        table,
        calibration,
        lambda name: np.asarray(work.get_submodule(name).weight.detach().numpy()),
        lambda done, total: progress("choose", done, total),
    )
    verification = _transform(work, table, choices, calibration.tokens, progress)
    if not recipe.rounding_options().needs_moments:
        rows = _round_to_nearest(work, table, progress)
    else:
        rows = round_blocks(
            work,
            table,
            calibration.tokens,
            executor=executor,
            progress=lambda done, total: progress("round", done, total),
        )
    report = {
        "recipe": recipe.to_dict(),
        "verification": verification.to_dict(),
        "notes": list(table.notes),
        "calibration_tokens": int(calibration.tokens.size),
        "signs": {"draw": calibration.draw, "losses": list(calibration.draw_losses)},
        "regions": regions,
        "matrices": rows,
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    copied = source.copied_files() if source else []
    result = Quantized(work, tokenizer, table, choices, verification, report, float_config, copied)
    if output is not None:
        progress("save", 0, 1)
        result.save(output)
        progress("save", 1, 1)
    return result


def _transform(
    model: Any,
    table: ModelPlan,
    choices: Choices,
    tokens: npt.NDArray[np.int64],
    progress: Progress,
) -> Verification:
    untie(model, table)
    model.double()
    reference = trace(model, table, tokens[:1, :_VERIFIED_TOKENS])
    transform_model(model, table, choices, lambda done, total: progress("transform", done, total))
    progress("verify", 0, 1)
    verification = verify(reference, model, table, choices)
    progress("verify", 1, 1)
    return verification


def _round_to_nearest(model: Any, table: ModelPlan, progress: Progress) -> list[dict[str, Any]]:
    recipe, rows = table.recipe, []
    for done, matrix in enumerate(table.quantized):
        module = model.get_submodule(matrix.name)
        W = module.weight.detach().numpy().astype(np.float32)
        quantized = round_to_nearest(W, recipe.weights)
        bias = getattr(module, "bias", None)
        layer = QuantizedLinear(
            quantized,
            None if bias is None else bias.detach().float(),
            matrix.input.rotation if matrix.online else None,
            recipe.activations,
            matrix.name,
        )
        model.set_submodule(matrix.name, layer)
        error = float(
            np.square(W - cq.dequantize(quantized)).sum() / max(np.square(W).sum(), 1e-30)
        )
        rows.append({"name": matrix.name, "relative_squared_error": error})
        progress("quantize", done + 1, len(table.quantized))
    model.float()
    return rows


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def _check_weights(model: Any) -> None:
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            good = torch.isfinite(tensor).numpy()
            index = tuple(int(i) for i in np.unravel_index(int(good.argmin()), good.shape))
            count = int(good.size - good.sum())
            raise cq.NonFiniteError(name, count, index, float(tensor[index]))


def _config_text(source: Source | None, model: Any) -> str:
    if source is not None and not source.is_gguf:
        return (source.path / "config.json").read_text(encoding="utf-8")
    text: str = model.config.to_json_string(use_diff=False)
    return text

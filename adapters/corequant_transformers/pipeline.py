"""The main job: calibrate, permute, rotate, verify, quantize, save."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import BackendError, CheckpointError
from corequant.recipe import Recipe
from corequant.storage.files import read_text
from corequant_torch.cpu.fast_forward import QuickForward
from corequant_transformers.architectures.unknown import check_described
from corequant_transformers.calibration.choices import Calibration, check_calibration
from corequant_transformers.calibration.gathering import gather
from corequant_transformers.checkpoint.writer import load, place_tensors, read_generation, save
from corequant_transformers.files.outputs import check_output
from corequant_transformers.model.devices import check_device, device_of
from corequant_transformers.model.layouts import standardize
from corequant_transformers.model.parts import ModelWeights, Parts, skeleton
from corequant_transformers.model.rebuilding import check_rebuilt, rebuild
from corequant_transformers.model.replicas import check_given, check_plain, unwrap
from corequant_transformers.model.shards import FileWeights, make_skeleton
from corequant_transformers.model.sources import Source
from corequant_transformers.model.structures import check_blocks, check_places, check_untouched
from corequant_transformers.model.surroundings import undisturbed
from corequant_transformers.model.text import (
    check_ids,
    check_positions,
    check_tokens,
    token_windows,
)
from corequant_transformers.planning.cost import held_bytes, peak_bytes, peak_rss_mib
from corequant_transformers.planning.model_plan import ModelPlan, plan_model
from corequant_transformers.run.estimate import Pace, efforts
from corequant_transformers.run.job import Job
from corequant_transformers.run.ledger import Ledger, MemoryLedger
from corequant_transformers.run.output import begin_run, describe_run, has_run, save_run
from corequant_transformers.transforms.matrices import Choices, restructure
from corequant_transformers.transforms.verification import Verification

__all__ = ["Calibration", "Quantized", "calibrate", "plan", "quantize"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)``."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """What ``quantize`` made.

    Attributes
    ----------
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
    made : transformers.PreTrainedModel, optional
        The model, where it was made in memory.
    path : Path, optional
        The directory that it was written to, where it was not.
    """

    tokenizer: Any
    plan: ModelPlan
    choices: Choices
    verification: Verification
    report: dict[str, Any]
    float_config: str
    copied_files: list[Path]
    made: Any = None
    path: Path | None = None

    @functools.cached_property
    def model(self) -> Any:
        """The model, with a ``QuantizedLinear`` for every quantized matrix.

        One that was written part by part is loaded when it is first asked for.
        """
        return load(self.path) if self.made is None and self.path is not None else self.made

    @undisturbed()
    def save(self, output: str | Path) -> Path:
        """Write the model to a new or empty directory and return its path.

        Raises
        ------
        ArchitectureError
            If the model has something that loading wouldn't build from its config, such as a hook.
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


@undisturbed()
def plan(model: str | Path | Any, recipe: Recipe) -> ModelPlan:
    """Say what ``quantize`` would do to a model, from its config and the names of its weights.

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
    model = model if source else unwrap(model)
    config = source.config() if source else cast(Any, model).config
    quantizer = getattr(config, "quantization_config", None)
    if quantizer is not None and not (source and source.is_gguf):
        where = source.path if source else type(model).__name__
        raise CheckpointError(
            f"{where} has a quantization_config, so it is quantized already; quantize the float "
            "model instead"
        )
    names = source.tensor_names if source else lambda: list(cast(Any, model).state_dict())
    check_described(config, names)
    table = plan_model(config, recipe)
    if source is None:
        check_untouched(model)
        _check_structure(model, table)
    if source is not None:
        # What no model can be made of should be known before any work.
        bare = make_skeleton(source)
        if not source.is_gguf:
            read_generation(source.path)
            FileWeights(source, bare, table)
    if source is None or not source.is_gguf:
        return table
    shapes = [m.shape for m in table.matrices]
    count = sum(rows * columns for rows, columns in shapes)
    if table.dimensions.tied:
        count -= table.dimensions.vocabulary * table.dimensions.hidden
    return replace(table, whole_bytes=4 * count)


@undisturbed()
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
        Untransformed, float; it is run where it is, on the CPU or a GPU. It is only read, so that
        it may run elsewhere meanwhile; its hooks run, in evaluation mode.
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
    BackendError
        If weights of the model are not in memory.
    CalibrationError
        If the text is empty or too short, or token windows of a wrong shape or with ids that the
        model has no row for.
    CheckpointError
        If the model is quantized already.
    NonFiniteError
        If an activation holds NaN or infinity.
    """
    model = check_given(model)
    if isinstance(calibration, str):
        if tokenizer is None:
            raise TypeError("tokenizer must be given with text, got None")
        tokens = token_windows(calibration, tokenizer, recipe.sequence_length, recipe.samples)
    else:
        tokens = check_tokens(calibration)
    table = plan_model(model.config, recipe)
    _check_structure(model, table)
    _check_windows(table, tokens)
    parts = Parts(skeleton(model), table, ModelWeights(model), device_of(model))
    with QuickForward():
        return gather(parts, table, tokens, progress)


@undisturbed()
def quantize(
    model: str | Path | Any,
    recipe: Recipe,
    calibration: str | npt.NDArray[Any] | Calibration,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    executor: Executor | None = None,
    resume: bool = False,
    memory: int | None = None,
    device: str | torch.device | None = None,
    events: Callable[[dict[str, Any]], None] = lambda event: None,
    progress: Progress = lambda phase, done, total: None,
) -> Quantized:
    """Permute, rotate and quantize a model; verify it on the way; save it if asked.

    Parameters
    ----------
    model : str, Path or transformers.PreTrainedModel
        A Transformers directory, a GGUF file, or a float model, which is only read and may run
        elsewhere meanwhile.
    recipe : Recipe
        What to do.
    calibration : str, numpy.ndarray (windows, length) or Calibration
        Text, token windows, or what ``calibrate`` returned for this very model.
    output : str or Path, optional
        A new or empty directory. Nothing is left there if anything fails. What a model on disk
        needs on the way is kept beside it, in a directory named ``output`` with ``.run`` at its
        end, so that a run that was stopped can go on; a run that ends removes it.
    tokenizer : transformers tokenizer, optional
        Of a model that is given as an object; one on disk brings its own.
    executor : concurrent.futures.Executor, optional
        Rounds layers that read the same input at the same time, in threads, processes or on other
        machines. The result has the same bytes as without one.
    resume : bool
        Go on with a run that was stopped, or begin one. The result has the same bytes as that of a
        run that was not stopped.
    memory : int, optional
        Bytes that the run may take, which ``limit_memory`` has the system enforce. Where that is
        little, forward passes hold less and are repeated instead; the result is the same.
    device : str or torch.device, optional
        Where forward passes, statistics, adaptive rounding and verification happen, such as
        ``"cuda"``, and where the result is if it is not written; by default where a model in
        memory is, and the CPU for one on disk. Matrices are transformed on the CPU in any case, so
        that what is rounded to nearest has the same codes from the same statistics everywhere.
        Sums of products differ in their last bits between devices, and what follows from them
        may.
    events : callable
        Called with a dictionary after each step of a model on disk: the step, the seconds that it
        took, and, from the second decoder block on, those that remain.
    progress : callable
        Called as ``progress(phase, done, total)``.

    Returns
    -------
    Quantized

    Raises
    ------
    ArchitectureError, BlockSizeError, HadamardOrderError
        If the recipe can't be carried out on the model, or an output is given for a model in memory
        that isn't what loading builds from its config.
    BackendError
        If there is no such device, an executor is given with another device than the CPU, or
        weights of a model that is given as an object are not in memory.
    CalibrationError
        If there is too little text, or token windows have a wrong shape or ids that the model has
        no row for.
    CheckpointError, OutputError
        If files can't be read or written, or the model is quantized already.
    RunError
        If a run was begun there and ``resume`` is false, or it was about something else, or another
        process is working on it.
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
        check_output(output, allow_full=resume and has_run(output))
    source = Source(model) if isinstance(model, str | Path) else None
    model = model if source else check_given(model)
    where = _device(device, None if source else model, executor)
    table = plan(model, recipe)
    if source is None:
        check_plain(model, [m.name for m in table.quantized])
        if output is not None:
            check_rebuilt(model, rebuild(_config_text(model)))
    if source is not None:
        tokenizer = _tokenizer(source, needed=isinstance(calibration, str))
    if isinstance(calibration, str):
        # Too little text should be known before the model is read.
        if tokenizer is None:
            raise TypeError("tokenizer must be given with text, got None")
        calibration = token_windows(calibration, tokenizer, recipe.sequence_length, recipe.samples)
    found = calibration if isinstance(calibration, Calibration) else None
    tokens = check_tokens(calibration if found is None else found.tokens)
    _check_windows(table, tokens)
    if found is not None:
        check_calibration(table, found)

    def make(ledger: Ledger, after: Callable[[str, float], None] = lambda step, s: None) -> _Made:
        given = model if source is None else source
        # What the plan foresees may be kept; a limit counts what was freed, too.
        spare = peak_bytes(table) if memory is None else 0
        parts, float_config = _parts(given, table, where, spare, progress)
        job = Job(
            parts,
            table,
            tokens,
            ledger,
            calibration=found,
            executor=executor,
            held_bytes=held_bytes(table, memory),
            progress=progress,
            after=after,
        )
        job.run()
        name = None if source is None else source.name
        return _Made(job, float_config, {"source": name, **_report(job, started)})

    def result(made: _Made, model: Any = None, path: Path | None = None) -> Quantized:
        copied = source.copied_files() if source else []
        job, verification = made.job, made.job.report()["verification"]
        return Quantized(
            tokenizer,
            job.plan,
            job.choices,
            verification,
            made.report,
            made.float_config,
            copied,
            model,
            path,
        )

    if output is None or source is None or found is not None:
        made = make(MemoryLedger())
        done = result(made, _with_generation(_assemble(made.job), source or model))
        if output is not None:
            progress("save", 0, 1)
            done.save(output)
            progress("save", 1, 1)
        return done
    manifest = describe_run(source, recipe, tokens, where)
    with begin_run(output, manifest, resume=resume) as run:
        pace = Pace(efforts(table, tokens.shape), run.log, events)
        made = make(run, pace.step)
        progress("save", 0, 1)
        save_run(
            run,
            made.job,
            output,
            report=made.report,
            float_config=made.float_config,
            tokenizer=tokenizer,
            copied_files=source.copied_files(),
        )
        progress("save", 1, 1)
    return result(made, path=Path(output).absolute())


def _tokenizer(source: Source, *, needed: bool) -> Any:
    """Return a source's tokenizer; None where it isn't needed, doesn't load and can be copied."""
    try:
        return source.tokenizer()
    except CheckpointError:
        if needed or source.is_gguf:
            raise
        return None


def _check_windows(table: ModelPlan, tokens: npt.NDArray[np.int64]) -> None:
    check_positions(table.architecture, table.dimensions, tokens)
    check_ids(tokens, table.dimensions.vocabulary)


@dataclass(frozen=True, eq=False)
class _Made:
    job: Job
    float_config: str
    report: dict[str, Any]


def _device(
    device: str | torch.device | None, model: Any, executor: Executor | None
) -> torch.device:
    if device is None:
        where = torch.device("cpu") if model is None else device_of(model)
    else:
        where = check_device(device)
    if executor is not None and where.type != "cpu":
        raise BackendError(
            f"executor must be left out where the device is not the CPU, got device {where}: its "
            "workers would share the device"
        )
    return where


def _check_structure(model: Any, table: ModelPlan) -> None:
    check_places(model, table.architecture)
    check_blocks(model, table.architecture, table.dimensions.blocks)


def _parts(
    model: Source | Any, table: ModelPlan, device: torch.device, spare: int, progress: Progress
) -> tuple[Parts, str]:
    """Return a model's parts, and the text of its config."""
    if isinstance(model, Source) and not model.is_gguf:
        bare = make_skeleton(model)
        weights = FileWeights(model, bare, table)
        text = read_text(model.config_file)
        return Parts(bare, table, weights, device, spare), text
    if isinstance(model, Source):
        progress("load", 0, 1)
        model = model.load()
        progress("load", 1, 1)
    parts = Parts(skeleton(model), table, ModelWeights(model), device, spare)
    return parts, _config_text(model)


def _config_text(model: Any) -> str:
    text: str = model.config.to_json_string(use_diff=False)
    return text


def _assemble(job: Job) -> Any:
    """Return the quantized model of a job that kept everything in memory."""
    model = job.parts.model
    standardize(model, job.plan)
    restructure(model, job.plan)
    tensors = {
        name: tensor
        for step in job.quantizing_steps
        for name, tensor in job.ledger.tensors(step).items()
    }
    return place_tensors(model, job.plan, tensors, "the result").to(job.parts.device)


def _with_generation(model: Any, origin: Any) -> Any:
    """Give a model what the float one says about generating text."""
    if isinstance(origin, Source):
        if not origin.is_gguf:
            model.generation_config = read_generation(origin.path) or model.generation_config
    elif getattr(origin, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(origin.generation_config)
    return model


def _report(job: Job, started: float) -> dict[str, Any]:
    found = job.report()
    return {
        "recipe": job.plan.recipe.to_dict(),
        "verification": found["verification"].to_dict(),
        "notes": list(job.plan.notes),
        "calibration_tokens": int(job.tokens.size),
        "signs": found["signs"],
        "regions": found["regions"],
        "matrices": found["matrices"],
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_mib": round(peak_rss_mib()),
    }

"""The main job: calibrate, permute, rotate, verify, quantize, save."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import CheckpointError, OutputError
from corequant.recipe import Recipe, has_budget
from corequant_transformers.architectures.known import (
    UnknownArchitectureError,
    kept_architecture,
    own_config,
)
from corequant_transformers.calibration.choices import Calibration, check_calibration
from corequant_transformers.calibration.data.given import (
    CalibrationData,
    Taken,
    needs_tokenizer,
    take_windows,
)
from corequant_transformers.checkpoint.origin import report_description
from corequant_transformers.checkpoint.quantized import Quantized
from corequant_transformers.checkpoint.tensors import assemble
from corequant_transformers.exports.destination import Destination
from corequant_transformers.model.forward import check_ids, check_positions
from corequant_transformers.model.layouts import (
    check_blocks,
    check_places,
    check_untouched,
)
from corequant_transformers.model.origins import origin_of
from corequant_transformers.model.parts import ModelWeights, Parts, is_tied, skeleton
from corequant_transformers.model.rebuilding import check_rebuilt, rebuild
from corequant_transformers.model.recognition import plan_recognized
from corequant_transformers.model.replicas import check_given, check_plain, unwrap
from corequant_transformers.model.source_files import read_generation
from corequant_transformers.model.sources import Source, plan_of_files
from corequant_transformers.model.surroundings import (
    device_for,
    device_of,
    peak_rss_mib,
    undisturbed,
)
from corequant_transformers.planning.model_plan import ModelPlan, plan_model, settle_dtype
from corequant_transformers.run.job import Job
from corequant_transformers.run.ledger import Ledger, MemoryLedger, steps_of
from corequant_transformers.run.output import begin_run, describe_run, has_run, save_run
from corequant_transformers.run.pace import Pace
from corequant_transformers.transforms.rehearsal import rehearse
from corequant_transformers.transforms.verification import Verification

__all__ = ["Calibration", "Quantized", "calibrate", "plan", "quantize"]

Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)``."""


@undisturbed()
def plan(model: str | Path | Any, recipe: Recipe, *, reader: str = "corequant") -> ModelPlan:
    """Plan what ``quantize`` would do to a model, from its config and the names of its weights.

    Parameters
    ----------
    model : str, Path or transformers.PreTrainedModel
    recipe : Recipe
    reader : str
        Program that the result is for, which tells what ``bits`` and ``size`` choose from.

    Returns
    -------
    ModelPlan

    Raises
    ------
    ArchitectureError, BlockSizeError, BudgetError, CheckpointError, HadamardOrderError
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
    config = source.config() if source else own_config(model)
    quantizer = getattr(config, "quantization_config", None)
    if quantizer is not None and not (source and source.is_gguf):
        where = source.path if source else type(model).__name__
        raise CheckpointError(
            f"{where} has a quantization_config, so it is quantized already; quantize the float "
            "model instead"
        )
    own = config if source else next(cast(Any, model).parameters(), config)
    recipe = settle_dtype(recipe, own)

    def made(recipe: Recipe) -> ModelPlan:
        more = (config, source.tensor_names) if source else ()
        return plan_for(source.skeleton if source else model, recipe, *more)

    if has_budget(recipe):
        from corequant_transformers.exports.room import settle_budget

        recipe = settle_budget(recipe, reader, made, source.path if source else model)
    table = made(recipe)
    if source is None:
        check_untouched(model)
        _check_structure(model, table)
        return replace(table, tied=table.tied and is_tied(model, table))
    # What no model can be made of should be known before any work.
    bare = source.skeleton()
    if not source.is_gguf:
        read_generation(source.path)
    return plan_of_files(table, bare, source.weights(bare, table))


def plan_for(
    model: Any, recipe: Recipe, config: Any = None, names: Callable[[], list[str]] | None = None
) -> ModelPlan:
    """Plan for a model, or for what makes it, whose type is described or else recognized."""
    config = own_config(model) if config is None else config
    try:
        return plan_model(config, recipe, kept_architecture(model))
    except UnknownArchitectureError as error:
        return plan_recognized(model, recipe, config, names, error)


@undisturbed()
def calibrate(
    model: Any,
    recipe: Recipe,
    calibration: CalibrationData = None,
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
        Gives the number and length of the windows that are taken from a text.
    calibration : str, Path, sequence of Path, Documents, Sample or numpy.ndarray, optional
        As for ``quantize``.
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
    taken = take_windows(calibration, recipe, tokenizer)
    table = plan_for(model, recipe)
    _check_structure(model, table)
    _check_windows(table, taken.tokens)
    parts = Parts(skeleton(model), table, ModelWeights(model), device_of(model))
    found = Job(parts, table, taken.tokens, MemoryLedger(), progress=progress).calibrate()
    return replace(found, data=taken.data)


@undisturbed()
def quantize(
    model: str | Path | Any,
    recipe: Recipe,
    calibration: CalibrationData = None,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    reader: str = "corequant",
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
        Recipe of transforms, formats and rounding.
    calibration : str, Path, sequence of Path, Documents, numpy.ndarray or Calibration, optional
        A text; files and folders, as for ``read_documents``, or what it returned; token windows
        (windows, length), or a ``Sample`` of them; or what ``calibrate`` returned for this very
        model. By default a public-domain text that the package carries.
    output : str or Path, optional
        A new or empty directory. Nothing is left there if anything fails. What a model on disk
        needs on the way is kept next to it, in a directory named ``output`` with ``.run`` at its
        end, so that a stopped run can be resumed; a run that ends removes it.
    tokenizer : transformers tokenizer, optional
        Tokenizer of a model in memory; one on disk brings its own.
    reader : str
        Program that the output is written for, one of ``corequant.recipe.READERS``, as ``export``
        would; for llama.cpp the output is a new file that ends in ``.gguf``.
    executor : concurrent.futures.Executor, optional
        Rounds layers that read the same input at the same time, in threads, processes or on other
        machines. The result has the same bytes as without one.
    resume : bool
        Resume a stopped run, or begin one. The result has the same bytes as that of a run that was
        not stopped.
    memory : int, optional
        Bytes that the run may take, which ``limit_memory`` has the system enforce. What a part
        leaves behind then goes back to the system at once.
    device : str or torch.device, optional
        Device of forward passes, statistics, adaptive rounding and verification, such as
        ``"cuda"``, and of a result that is not written; by default that of a model in memory, and
        the CPU for one on disk. Matrices are transformed on the CPU in any case, so
        that what is rounded to nearest has the same codes from the same statistics everywhere.
        Sums of products differ in their last bits between devices, and what follows from them
        may.
    events : callable
        Called with a dictionary after each step of a model on disk: the step, the seconds that it
        took, and, from the second rounded block on, those that the remaining blocks take.
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
        If the recipe's rounding can't use a layer's inputs; names the layer.
    NonFiniteError
        If weights or activations hold NaN or infinity.
    VerificationError
        If the transformed model doesn't equal the float model before it is quantized.

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
    goal = None if output is None else Destination(output, reader)
    if goal is None and reader != "corequant":
        raise OutputError(f"output must be given to be written for {reader}")
    if goal is not None:
        goal.check(begun=resume and has_run(goal.output))
    source = Source(model) if isinstance(model, str | Path) else None
    model = model if source else check_given(model)
    where = device_for(device, None if source else model, executor)
    table = plan(model, recipe, reader=reader)
    if source is None:
        names = [m.name for m in table.quantized]
        check_plain(model, names, table.architecture.linear_classes)
        if goal is not None:
            check_rebuilt(model, rebuild(_config_text(model)))
    if goal is not None:
        goal.check_plan(table, source.config() if source else cast(Any, model).config, source)
    if source is not None:
        tokenizer = source.tokenizer(needed=needs_tokenizer(calibration))
    # Too little text should be known before the model is read.
    taken = take_windows(calibration, recipe, tokenizer)
    _check_windows(table, taken.tokens)
    if taken.calibration is not None:
        check_calibration(table, taken.calibration)
    rehearsed = None if table.is_shipped else rehearse(source or model, table, where, progress)
    # What the plan foresees may be kept; a limit counts what was freed, too.
    spare = table.peak_bytes() if memory is None else 0
    task = _Task(
        source or model,
        table,
        taken,
        tokenizer,
        where,
        executor,
        spare,
        progress,
        started,
        rehearsed,
    )
    if goal is None or source is None or taken.calibration is not None:
        job, float_config = task.run(MemoryLedger())
        made = assemble(job.parts.model, job.plan, job.tensors(), source or model)
        result = task.result(job, float_config, made.to(job.parts.device))
        if goal is not None:
            progress("save", 0, 1)
            goal.save(result, source)
            progress("save", 1, 1)
        return result
    given = table.recipe if has_budget(recipe) else recipe
    manifest = describe_run(source, given, taken.tokens, where, table)
    with begin_run(goal.output, manifest, resume=resume, check=goal.check) as run:
        job, float_config = task.run(run, Pace(steps_of(table), run.log, events).step)
        result = task.result(job, float_config, path=Path(goal.output).absolute())
        progress("save", 0, 1)
        save_run(run, job, result, goal.output, goal.conversion(source))
        progress("save", 1, 1)
    return result


@dataclass(frozen=True, eq=False)
class _Task:
    """The checked arguments of ``quantize``."""

    given: Source | Any
    plan: ModelPlan
    taken: Taken
    tokenizer: Any
    device: torch.device
    executor: Executor | None
    spare: int
    progress: Progress
    started: float
    rehearsed: Verification | None = None

    def run(
        self, ledger: Ledger, after: Callable[[str, float], None] = lambda step, s: None
    ) -> tuple[Job, str]:
        """Carry out all steps that the ledger lacks; return them and the float model's config."""
        parts, float_config = self._parts()
        job = Job(
            parts,
            self.plan,
            self.taken.tokens,
            ledger,
            calibration=self.taken.calibration,
            executor=self.executor,
            progress=self.progress,
            after=after,
        )
        job.run()
        return job, float_config

    def _parts(self) -> tuple[Parts, str]:
        given, options = self.given, (self.device, self.spare)
        if isinstance(given, Source):
            bare = given.skeleton()
            weights = given.weights(bare, self.plan)
            return Parts(bare, self.plan, weights, *options), given.config_text()
        parts = Parts(skeleton(given), self.plan, ModelWeights(given), *options)
        return parts, _config_text(given)

    def result(
        self, job: Job, float_config: str, model: Any = None, path: Path | None = None
    ) -> Quantized:
        """Return the result of a finished job."""
        source = self.given if isinstance(self.given, Source) else None
        found = job.report()
        report = {
            "source": None if source is None else source.name,
            "origin": {} if source is None else origin_of(source),
            "recipe": job.plan.recipe.to_dict(),
            "verification": found["verification"].to_dict(),
            "notes": list(job.plan.notes),
            **({} if job.plan.is_shipped else report_description(job.plan, self.rehearsed)),
            "calibration_tokens": int(job.tokens.size),
            "calibration": dict(self.taken.data),
            "signs": found["signs"],
            "regions": found["regions"],
            **({} if found["widths"] is None else {"widths": found["widths"]}),
            "matrices": found["matrices"],
            "seconds": round(time.monotonic() - self.started, 1),
            "peak_rss_mib": round(peak_rss_mib()),
        }
        copied = [] if source is None else source.copied_files()
        return Quantized(
            self.tokenizer,
            job.plan,
            job.choices,
            found["verification"],
            report,
            float_config,
            copied,
            model,
            path,
        )


def _config_text(model: Any) -> str:
    text: str = own_config(model).to_json_string(use_diff=False)
    return text


def _check_windows(table: ModelPlan, tokens: npt.NDArray[np.int64]) -> None:
    check_positions(table.architecture, table.dimensions, tokens)
    check_ids(tokens, table.dimensions.vocabulary)


def _check_structure(model: Any, table: ModelPlan) -> None:
    check_places(model, table.architecture)
    check_blocks(model, table.architecture, table.dimensions.blocks)

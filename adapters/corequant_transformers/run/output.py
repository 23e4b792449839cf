"""A run that is kept on the disk, from its beginning to the directory that it ends in."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import OutputError
from corequant.recipe import Recipe
from corequant.storage.files import version_of
from corequant_transformers.checkpoint.origin import written_description
from corequant_transformers.checkpoint.quantized import Quantized
from corequant_transformers.checkpoint.writer import writing
from corequant_transformers.files.atomic import concatenate, file_sha256
from corequant_transformers.files.companions import TEMPLATES
from corequant_transformers.files.digests import pieces
from corequant_transformers.files.marks import WEIGHTS
from corequant_transformers.files.outputs import UNFINISHED, check_output, contents, real_path
from corequant_transformers.model.source_files import place_of
from corequant_transformers.model.sources import Source
from corequant_transformers.planning.model_plan import ModelPlan
from corequant_transformers.run.directory import LOG, RunDirectory, ended
from corequant_transformers.run.job import Job

__all__ = ["begin_run", "describe_run", "has_run", "run_directory", "save_run"]

_VERSIONS = ("corequant", "numpy", "numba", "torch", "transformers", "safetensors")
_SAVED = "saved.json"
_OWN = "own"


def run_directory(output: str | Path) -> Path:
    """Return where a run keeps what it needs on the way to ``output``."""
    return Path(f"{real_path(output)}.run")


def has_run(output: str | Path) -> bool:
    """Return whether a run to ``output`` was stopped, possibly while it cleaned up."""
    folder = run_directory(output)
    return folder.is_dir() or ended(folder).is_dir()


def describe_run(
    source: Source,
    recipe: Recipe,
    tokens: npt.NDArray[np.int64],
    device: torch.device,
    plan: ModelPlan,
) -> dict[str, Any]:
    """Return all that a run's result depends on: recipe, versions, fingerprints of model and data.

    Parameters
    ----------
    source : Source
    recipe : Recipe
        With its seed.
    tokens : numpy.ndarray (windows, length), int64
    device : torch.device
        Device of sums of products, whose last bits differ between devices.
    plan : ModelPlan
        Its description is part of it, unless that comes with the package.
    """
    files = {place_of(file): file_sha256(file) for file in source.files()}
    data = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes())
    return {
        "format": 2,
        "recipe": recipe.to_dict(),
        **written_description(plan),
        "data": {"shape": list(tokens.shape), "sha256": data.hexdigest()},
        "model": files,
        "device": _name_of(device),
        "versions": {name: version_of(name) for name in _VERSIONS},
    }


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


@contextmanager
def begin_run(
    output: str | Path,
    manifest: dict[str, Any],
    *,
    resume: bool,
    check: Callable[[], object] | None = None,
) -> Iterator[RunDirectory]:
    """Yield a run's directory, which is removed at the end, or kept if the run is stopped.

    A run that is stopped before its first step is done leaves nothing.

    Parameters
    ----------
    output : str or Path
    manifest : dict
    resume : bool
    check : callable, optional
        Refuses an output that can't be written; ``check_output`` by default.

    Raises
    ------
    OutputError, RunError
        As ``RunDirectory``; also if something that this run didn't make is in ``output``.
    """
    run = RunDirectory(run_directory(output), manifest, resume=resume)
    try:
        saved = run.mark(_SAVED)
        target = Path(output)
        if saved is None or not _is_whole(target, saved):
            _clear(target, saved or {})
            check_output(output) if check is None else check()
        yield run
    except BaseException as error:
        if run.begun:
            run.close()
            if isinstance(error, OutputError) and isinstance(error.__cause__, OSError):
                raise OutputError(
                    f"{error}; what is done so far is kept in {run.path}, so the run can go on "
                    "with --resume (resume=True)"
                ) from error.__cause__
        else:
            run.remove()
        raise
    run.remove()


def _found(made: Path) -> dict[str, Any]:
    """Return the digests of a result: of a file, or of all files in a directory."""
    if made.is_file():
        return {"sha256": file_sha256(made)}
    return {"files": {name: file_sha256(made / name) for name in pieces(made)}}


def _is_whole(target: Path, saved: dict[str, Any]) -> bool:
    """Return whether a result is there as it was saved."""
    if target.is_file():
        return _holds(target, saved.get("sha256"))
    files = saved.get("files")
    if not isinstance(files, dict) or not files:
        return False
    if WEIGHTS in files:
        # It gets its place last.
        return _holds(target / WEIGHTS, files[WEIGHTS])
    return all(_holds(target / name, digest) for name, digest in files.items())


def _holds(file: Path, digest: Any) -> bool:
    return file.is_file() and file_sha256(file) == digest


def _clear(target: Path, saved: dict[str, Any]) -> None:
    """Remove from a directory what a run to it that was killed had written or moved there."""
    if not target.is_dir():
        return
    for folder in target.glob(UNFINISHED):
        shutil.rmtree(folder, ignore_errors=True)
    files = saved.get("files")
    system = {file.name for file in target.iterdir()} - {file.name for file in contents(target)}
    found = [name for name in pieces(target) if name not in system]
    if isinstance(files, dict) and all(_holds(target / n, files.get(n)) for n in found):
        for name in found:
            (target / name).unlink()
        if (target / TEMPLATES).is_dir():
            (target / TEMPLATES).rmdir()


def save_run(
    run: RunDirectory,
    job: Job,
    result: Quantized,
    output: str | Path,
    convert: Callable[[Path, Path, Callable[[Path], object]], None] | None = None,
) -> Path:
    """Write what a run ends in, a piece at a time, unless it is there already.

    Parameters
    ----------
    run : RunDirectory
    job : Job
        All of its steps are done.
    result : Quantized
        Source of the report, the config and the tokenizer.
    output : str or Path
    convert : callable, optional
        Makes the output of the directory, which then lies in the run's own; called with that
        directory, the folder for what isn't whole yet, and what to call before the output gets
        its name.

    Raises
    ------
    OutputError
        If it can't be written or doesn't read back equal; nothing is left there then.
    """
    target = Path(output).absolute()
    saved = run.mark(_SAVED)
    if saved is not None and _is_whole(target, saved):
        # The run was stopped while it cleared up.
        return target

    def record(made: Path) -> None:
        run.mark(_SAVED, _found(made))

    if convert is None:
        _write_directory(run, job, result, target, record)
        return target
    own = run.path / _OWN
    if not own.is_dir():
        _write_directory(run, job, result, own)
    convert(own, run.path, record)
    return target


def _write_directory(
    run: RunDirectory,
    job: Job,
    result: Quantized,
    target: Path,
    complete: Callable[[Path], object] = lambda made: None,
) -> None:
    with writing(
        target,
        type(job.parts.model).__name__,
        job.plan,
        report=result.report,
        float_config=result.float_config,
        tokenizer=result.tokenizer,
        copied_files=result.copied_files,
        within=run.path,
        complete=complete,
    ) as folder:
        concatenate(folder / WEIGHTS, run.tensor_files(job.quantizing_steps))
        log = (run.path / LOG).read_bytes() if (run.path / LOG).exists() else b""
        (folder / LOG).write_bytes(log)

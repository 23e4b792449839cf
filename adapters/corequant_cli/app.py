"""The command line: its commands, exit status and error messages.

A command imports the adapter, and with it torch and Transformers, only after its arguments have
been checked, so that help and usage errors are immediate.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from corequant.errors import CorequantError
from corequant_cli.commands.demo import demo
from corequant_cli.commands.describe import describe
from corequant_cli.commands.evaluate import evaluate
from corequant_cli.commands.export import export
from corequant_cli.commands.formats import formats
from corequant_cli.commands.inspect import inspect
from corequant_cli.commands.panels import PanelCommand, PanelGroup
from corequant_cli.commands.plan import plan
from corequant_cli.commands.presets import presets
from corequant_cli.commands.quantize import quantize
from corequant_cli.commands.system import backends, cache
from corequant_cli.tables.console import plain

__all__ = ["app", "run"]

_EXAMPLES = """
Examples:
  corequant quantize MODEL -o OUT --preset w4a16
  corequant quantize MODEL -o OUT.gguf --for llama.cpp
  corequant evaluate OUT --text test.txt --against MODEL --windows 10

MODEL is a Transformers directory or a GGUF file.
"""

# Rich's tables of help would cut long names short at 80 columns.
app = typer.Typer(
    cls=PanelGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
    epilog=_EXAMPLES,
)

_INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Permute, rotate, quantize: language models in 2 to 8 bits, on the CPU or a GPU."""
    if version:
        from corequant import __version__

        print(f"corequant {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Make a model": (quantize, plan, describe, presets, formats),
    "Judge it": (evaluate, inspect),
    "Use it elsewhere": (export,),
    "See it work": (demo,),
    "This installation": (backends, cache),
}

_EPILOGS: dict[Callable[..., None], str] = {
    quantize: """
Examples:
  corequant quantize MODEL -o OUT
  corequant quantize MODEL -o OUT --preset w8a8 --for vllm
  corequant quantize MODEL -o OUT.gguf --for llama.cpp
  corequant quantize MODEL -o OUT --weights int3:group64
""",
    plan: """
Examples:
  corequant plan MODEL --preset w4a4
  corequant plan MODEL --for llama.cpp
""",
    describe: """
Examples:
  corequant describe MODEL > mine.toml
  corequant quantize MODEL -o OUT --architecture mine.toml
""",
    evaluate: """
Examples:
  corequant evaluate OUT --text test.txt
  corequant evaluate OUT --text test.txt --against MODEL --windows 10
  corequant evaluate OUT --against MODEL --tasks hellaswag.jsonl --limit 500
""",
    presets: """
Examples:
  corequant presets
  corequant presets w4a4
""",
}

for panel, commands in _PANELS.items():
    for command in commands:
        epilog = _EPILOGS.get(command)
        app.command(cls=PanelCommand, rich_help_panel=panel, epilog=epilog)(command)


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
        # Of what takes long, this one keeps what it has done.
        more = ", and it can continue with --resume" if "quantize" in sys.argv[1:2] else ""
        print(f"corequant: interrupted; no partial output was left{more}", file=sys.stderr)
    return status


def _complain(what: object) -> None:
    """Print an error as one line, safe for a terminal."""
    print(f"corequant: {plain(str(what).replace(chr(10), ' '))}", file=sys.stderr)


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    _complain(message)

"""Help in panels: what is made, where, how good, and what only experts change; then examples.

Text without frames: nothing is cut short on a narrow terminal, and ``--help`` needs no rich.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["EXPERT", "QUALITY", "WHAT", "WHERE", "PanelCommand", "PanelGroup"]

WHAT = "What"
WHERE = "Where"
QUALITY = "How good"
EXPERT = "Expert"

_ORDER = (WHAT, WHERE, QUALITY, EXPERT)
_OTHERS = "Options"


class PanelCommand(TyperCommand):
    """A command whose options are shown by panel, and whose arguments are words in capitals."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what stands in the usage after the command."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        names = [_argument(p) for p in arguments]
        shown = [n if p.required else f"[{n}]" for n, p in zip(names, arguments, strict=True)]
        return [self.options_metavar or "", *shown]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each panel; arguments come first."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            panel = getattr(parameter, "rich_help_panel", None) or _OTHERS
            if parameter.param_type_name == "argument":
                panel, record = "Arguments", (_argument(parameter), _told(parameter, record[1]))
            sections.setdefault(panel, []).append(record)
        order = ["Arguments", *_ORDER, _OTHERS]
        for panel in sorted(sections, key=order.index):
            with formatter.section(panel):
                # Long names get a line of their own rather than most of a narrow terminal.
                formatter.write_dl(sections[panel], col_max=30 if formatter.width > 70 else 20)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog line by line, as it is."""
        _write_epilog(self.epilog, formatter)


class PanelGroup(TyperGroup):
    """A group whose commands are shown by panel, each with its whole first sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each panel of commands."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            panel = getattr(command, "rich_help_panel", None) or "Commands"
            text = " ".join((command.help or "").partition("\n\n")[0].split())
            sections.setdefault(panel, []).append((name, text))
        for panel, rows in sections.items():
            with formatter.section(panel):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog line by line, as it is."""
        _write_epilog(self.epilog, formatter)


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _told(parameter: Any, text: str) -> str:
    """Return an argument's help; the usage says already whether it is required."""
    return text.removesuffix("[required]").rstrip()


def _write_epilog(text: str | None, formatter: Any) -> None:
    if text:
        formatter.write_paragraph()
        formatter.write(f"{text.strip()}\n")

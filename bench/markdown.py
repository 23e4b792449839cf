"""Sections of bench/README.md, each written by the script that measured it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_section"]

PAGE = Path(__file__).parent / "README.md"


def write_section(name: str, body: str) -> None:
    """Replace the section between the markers of that name, or add it at the end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Benchmarks\n"
    if begin not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n"
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n{body.rstrip()}\n{end}{after}", encoding="utf-8")

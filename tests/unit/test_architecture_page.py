"""docs/architecture.md names what is there, and twins name each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
TREES = {
    "corequant": ROOT / "corequant",
    "backends/corequant_torch": ROOT / "backends" / "corequant_torch",
    "adapters/corequant_transformers": ROOT / "adapters" / "corequant_transformers",
}
FOLDERS = [
    *TREES.values(),
    ROOT / "corequant" / "_cpu",
    ROOT / "corequant" / "rounding",
    ROOT / "adapters" / "corequant_cli",
    *(
        TREES["adapters/corequant_transformers"] / n
        for n in ("calibration", "transforms", "rounding")
    ),
    ROOT,
    ROOT / "backends",
    ROOT / "adapters",
]


def twins() -> dict[str, set[str]]:
    """Return the twins that each module names in its docstring."""
    found = {}
    for package, folder in TREES.items():
        for file in sorted(folder.rglob("*.py")):
            text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
            names = re.findall(r"`([\w.]+)`", text.partition("\nBit-exact twin: ")[2])
            if names:
                parts = file.relative_to(ROOT / Path(package).parent).with_suffix("").parts
                found[".".join(parts)] = set(names)
    return found


def in_the_table() -> set[str]:
    rows = [line for line in PAGE.partition("## Twins")[2].splitlines() if line.startswith("| ")]
    heads = ("corequant", "corequant_torch", "corequant_torch")
    found = set()
    for row in rows[2:] if rows[1].startswith("|-") else rows[1:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        for head, cell in zip(heads, cells, strict=True):
            for name in re.findall(r"`([\w/]+)`", cell):
                found.add(f"{head}.{name.replace('/', '.')}")
    return found


def test_twins_exist_and_are_in_the_table():
    named = twins()
    assert named
    assert {name for names in named.values() for name in names} | set(named) == in_the_table()


def test_twins_name_each_other():
    named = twins()
    one_way = [(a, b) for a, others in named.items() for b in others if a not in named.get(b, ())]
    assert not one_way


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+(?:\.py|/))`", PAGE))))
def test_files_of_the_page_are_there(name):
    assert any((folder / name).exists() for folder in FOLDERS) or any(
        path.is_file() for folder in FOLDERS for path in folder.glob(f"*/{name}")
    ), name

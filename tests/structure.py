"""Print the measures of the source tree and fail where one exceeds its limit.

Usage: python tests/structure.py [ROOT]

Entries are files and folders directly inside the packages. Imports count wherever they stand: at
the top, under ``TYPE_CHECKING`` and inside functions. A function is measured without its docstring.
Which package may import which is a contract of import-linter, in ``pyproject.toml``.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "corequant",
    "backends/corequant_torch",
    "adapters/corequant_transformers",
    "adapters/corequant_vllm",
    "adapters/corequant_cli",
)
MAX_ENTRIES = 65
MAX_MODULES_IN_FOLDER = 25
MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 80


def modules(root: Path) -> dict[str, Path]:
    """Return the file of every product module by its dotted name."""
    found = {}
    for package in PACKAGES:
        base = (root / package).parent
        for file in sorted((root / package).rglob("*.py")):
            name = ".".join(file.relative_to(base).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


def imports(name: str, tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """Yield the product modules that a module imports."""
    for node in ast.walk(tree):
        wanted = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                wanted.append(full if full in known else node.module)
        yield from (module for module in wanted if module in known and module != name)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members: list[str] = []
            while node not in members:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def functions(name: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the functions of a module and their lines without docstrings."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = _lines(node)
        if ast.get_docstring(node, clean=False) is not None:
            lines -= _lines(node.body[0])
        yield f"{name}:{node.lineno} {node.name}", lines


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _longest(what: str, sizes: dict[str, int], limit: int) -> list[str]:
    """Print the largest size and return those that exceed the limit."""
    name = max(sizes, key=lambda name: sizes[name])
    print(f"longest {what} {name}: {sizes[name]} (at most {limit})")
    return [f"{what} {name}: {size}" for name, size in sizes.items() if size > limit]


def _is_entry(path: Path) -> bool:
    """Return whether a path is a file, or a folder with more than what Python left there."""
    return path.is_file() or any(
        file.is_file() and file.parent.name != "__pycache__" for file in path.rglob("*")
    )


def main() -> int:
    """Print all measures, and on stderr every one beyond its limit."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    known = modules(root)
    texts = {name: file.read_text("utf-8") for name, file in known.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    entries = {
        package: sum(_is_entry(path) for path in (root / package).iterdir()) for package in PACKAGES
    }
    folders = Counter(str(file.parent.relative_to(root)) for file in known.values())
    lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    bodies = dict(item for name, tree in trees.items() for item in functions(name, tree))
    found = circles({name: set(imports(name, tree, known)) for name, tree in trees.items()})

    print(f"modules {len(known)}, lines {sum(lengths.values())}")
    total = sum(entries.values())
    each = ", ".join(f"{Path(package).name} {count}" for package, count in entries.items())
    print(f"first-level entries {total} (at most {MAX_ENTRIES}): {each}")
    print(f"import circles {len(found)} (none allowed)")
    faults = [f"{total} first-level entries"] if total > MAX_ENTRIES else []
    faults += ["import circle: " + ", ".join(members) for members in found]
    faults += _longest("folder in modules,", folders, MAX_MODULES_IN_FOLDER)
    faults += _longest("module in lines,", lengths, MAX_MODULE_LINES)
    faults += _longest("function in lines,", bodies, MAX_FUNCTION_LINES)
    for fault in faults:
        print(f"beyond the limit: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

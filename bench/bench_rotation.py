"""Block rotations against the limits of memory and against other implementations.

Usage: python bench/bench_rotation.py [PART ...] [--rounds 9] [--list] [--write]

Without a part all are measured, each of which takes seconds; they may also be measured one by one,
whenever the machine is quiet. Results are kept in bench/rotation.json, from which ``--write`` makes
the tables and the plot of bench/README.md. Each target is printed beside its figure.

Every figure is a ratio measured in one run: candidates take turns, forwards and backwards, on one
pinned thread, and medians of thread CPU time are compared. Results are compared before anything is
timed. ``limit`` is in-place negation, which reads and writes each line once; ``copyto`` is
np.copyto, which also reads what it overwrites (up to the size from which the C library streams).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path

from rotation_allocations import ALLOCATION_PARTS
from rotation_parts import PARTS as OTHER_PARTS
from rotation_parts import POWERS, Goal, Result

PARTS = OTHER_PARTS | ALLOCATION_PARTS
HERE = Path(__file__).parent
KEPT = HERE / "rotation.json"
MARKS = ("<!-- rotation: begin -->", "<!-- rotation: end -->")


def described() -> str:
    """Say what machine and which versions this is."""
    from corequant._cpu.codegen.compiler import processor

    names = ("numpy", "llvmlite", "torch", "fht-cpu", "hadamard-transform", "brevitas")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model} ({processor()[0]}), Python {platform.python_version()}, {versions}."


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{c:.2f}" if isinstance(c, float) else str(c) for c in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def section(result: Result) -> str:
    return f"### {result.title}\n\n{table(result.head, result.rows)}"


def targets(results: list[Result]) -> str:
    """Put every target beside what was found, those that were missed in bold."""
    rows: list[list[object]] = []
    for goal in sorted((g for r in results for g in r.goals), key=lambda g: g.what[0]):
        sign = "≤" if goal.most else "≥"
        found = f"{goal.found:.2f}"
        shown = found if goal.met else f"**{found}**"
        rows.append([goal.what, f"{sign} {goal.target:.2f}", shown])
    return table(["line and figure", "target", "found"], rows)


def kept() -> dict[str, Result]:
    """Read the results of this machine and these versions; others count as none."""
    content = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if content.get("machine") != described():
        return {}
    results = {}
    for name, values in content["parts"].items():
        goals = [Goal(**goal) for goal in values.pop("goals")]
        results[name] = Result(**values, goals=goals)
    return results


def keep(results: dict[str, Result]) -> None:
    parts = {name: results[name].as_dict() for name in PARTS if name in results}
    content = {"machine": described(), "parts": parts}
    KEPT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def plot(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "rotation"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, values in curves.items():
        axes.plot(POWERS, values, "--" if name == "limit" else "o-", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="block size", ylabel="speed, np.copyto = 1", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write(results: dict[str, Result]) -> None:
    """Replace this benchmark's part of bench/README.md, and the plot."""
    missing = [name for name in PARTS if name not in results]
    if missing:
        raise SystemExit(f"not yet measured on this machine: {' '.join(missing)}")
    ordered = [results[name] for name in PARTS]
    plot(results["powers"].curves, HERE / "rotation.svg")
    page = HERE / "README.md"
    old = page.read_text() if page.exists() else "# Benchmarks\n\n" + "\n".join(MARKS) + "\n"
    if MARKS[0] not in old:
        old += "\n" + "\n".join(MARKS) + "\n"
    before, _, rest = old.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    body = "\n".join(
        [
            "## Rotations\n",
            "Written by `bench_rotation.py`; ratios are speeds.\n",
            f"{described()}\n",
            *map(section, ordered),
            "![Speed over block size](rotation.svg)\n",
            "### Targets\n",
            "What was missed is in bold; `docs/kernels.md` tells why.\n",
            targets(ordered),
        ]
    )
    page.write_text(f"{before}{MARKS[0]}\n{body}{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--write", action="store_true", help="write bench/README.md and the plot")
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {' '.join(unknown)}; there are: {' '.join(PARTS)}")
    if options.list:
        print(*PARTS)
        return
    results = kept()
    affinity = os.sched_getaffinity(0)
    # To write alone is to measure nothing where everything has been measured.
    chosen = options.parts or ([] if options.write and set(results) == set(PARTS) else list(PARTS))
    for name in chosen:
        os.sched_setaffinity(0, affinity)
        results[name] = PARTS[name](options.rounds)
        keep(results)
        print(section(results[name]), targets([results[name]]), sep="\n", flush=True)
    if options.write:
        write(results)


if __name__ == "__main__":
    main()

"""What a plan does to matrices and tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from corequant_cli.tables.console import column, console, marked, table

__all__ = ["fates", "plan_dict", "plan_table", "sizes"]


def fates(rows: list[dict[str, Any]]) -> None:
    """Print a line for each tensor of the model."""
    grid = table("tensor", "shape", "fate")
    for row in rows:
        grid.add_row(marked(row["name"]), "×".join(map(str, row["shape"])), row["fate"])
    console().print(grid)


def plan_dict(plan: Any) -> dict[str, Any]:
    """Return a plan as plain values."""
    return {
        "model_type": plan.architecture.model_type,
        "recipe": plan.recipe.to_dict(),
        "tied": plan.tied,
        **plan.cost(),
        "matrices": [
            {
                "name": m.name,
                "shape": list(m.shape),
                "norm": m.norm if plan.folds_norm(m) else None,
                "input_permuted": m.input.permutation is not None,
                "input_rotation": m.input.rotation,
                "online": m.online,
                "output_permuted": m.output.permutation is not None,
                "output_rotation": m.output.rotation,
                "parts": [
                    {
                        "rows": part.rows,
                        "output_permuted": part.output.permutation is not None,
                        "output_rotation": part.output.rotation,
                    }
                    for part in m.slices
                ],
                "quantized": m.quantized,
                "weights": str(m.weights) if m.quantized else None,
                "activations": None if m.activations is None else str(m.activations),
                "rounding": m.options.method if m.quantized else None,
            }
            for m in plan.matrices
        ],
        "notes": list(plan.notes),
    }


def plan_table(plan: Any) -> None:
    """Print what is done to each kind of matrix."""
    sizes, kind = plan.dimensions, marked(plan.architecture.model_type)
    grid = table(
        column("matrix", no_wrap=True), "shape", "folds", "reads", "writes", "rounded",
        title=f"{kind}: {sizes.blocks} blocks, hidden {sizes.hidden}, "
        f"intermediate {sizes.intermediate}, head {sizes.head_dim}",
    )  # fmt: skip
    schemes = Counter((m.weights, m.activations) for m in plan.quantized)
    names = _names_of({weights for weights, _ in schemes})
    blocks = _kinds_of_blocks(plan)
    for m, title in _examples(plan, blocks):
        if title and len(blocks) > 1:
            grid.add_section()
            grid.add_row(title)
        path = "" if m.block is None else plan.architecture.block.format(m.block) + "."
        rounded = names[m.weights] if m.quantized and len(schemes) > 1 else "yes"
        grid.add_row(
            marked(m.name.removeprefix(path)),
            "×".join(map(str, m.shape)),
            "norm" if plan.folds_norm(m) else "",
            _side(m.input, "online " if m.online else ""),
            ", ".join(filter(None, dict.fromkeys(_side(p.output, "") for p in m.row_slices))),
            rounded if m.quantized else "",
        )
    console().print(grid)
    for note in plan.notes:
        console().print(f"note: {marked(note)}")
    cost = plan.cost()
    for (weights, activations), count in schemes.items():
        layers = f"{count} × " if len(schemes) > 1 else ""
        console().print(f"{layers}weights {weights}, activations {activations or 'float'}")
    console().print(f"everything else {plan.recipe.dtype}, {_vocabulary(plan)}")
    console().print(
        f"online rotations: {cost['online_rotations']}, "
        f"{cost['online_additions_per_token']:,} additions per token "
        f"({cost['online_share']:.2%} of the linear layers' multiplications), "
        f"{cost['online_bytes_per_token'] / 1024:.0f} KiB read and written\n"
        f"quantized weights: {cost['quantized_mib']:.1f} MiB of {cost['float_mib']:.1f} MiB float; "
        f"peak memory about {cost['peak_mib']:.0f} MiB"
    )
    console().print(
        f"valid block sizes for {_widths(plan)}: " + ", ".join(map(str, cost["block_sizes"]))
    )


def _vocabulary(plan: Any) -> str:
    """Say whether embedding and head are one matrix, and whether they are quantized."""
    a = plan.architecture
    if a.enclosed:
        return "what surrounds the blocks is copied"
    rows = [m for m in plan.matrices if m.name in (a.embedding, a.head)]
    kinds = [str(m.weights) if m.quantized else plan.recipe.dtype for m in rows]
    if plan.tied:
        return f"embedding and head one matrix ({kinds[0]})"
    return f"embedding ({kinds[0]}) and head ({kinds[1]}) two matrices"


def sizes(found: dict[str, int | None]) -> None:
    """Print how large the result will be in each layout that can hold it."""
    names = {"corequant": "corequant's directory", "gguf": "GGUF with its tokenizer"}
    words = [f"{size / 1e6:.1f} MB as {names.get(k, k)}" for k, size in found.items() if size]
    console().print(f"size of the result: {', '.join(words)}")


def _names_of(specs: set[Any]) -> dict[Any, str]:
    """Return quantizers' formats, where these tell them apart, otherwise all of their texts."""
    formats = {spec: spec.format.name for spec in specs}
    apart = len(set(formats.values())) == len(specs)
    return formats if apart else {spec: str(spec) for spec in specs}


def _kinds_of_blocks(plan: Any) -> list[list[int]]:
    """Return the indices of the blocks of each kind."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i in range(plan.dimensions.blocks):
        rows = (m for m in plan.matrices if m.block == i)
        kinds.setdefault(tuple((m.role, m.shape, m.settings) for m in rows), []).append(i)
    return list(kinds.values())


def _examples(plan: Any, blocks: list[list[int]]) -> Iterator[tuple[Any, str]]:
    """Yield rows that stand for others, the first of each block with the block's name.

    One block of each kind stands for all, and so does one expert.
    """
    titles = {alike[0]: _range(alike) for alike in blocks}
    last, seen = None, set()
    for m in plan.matrices:
        if m.block is not None and m.block not in titles:
            continue
        if m.expert is not None:
            if (m.block, m.name.rpartition(".")[2], m.settings) in seen:
                continue
            seen.add((m.block, m.name.rpartition(".")[2], m.settings))
        title = titles.get(m.block, "after the blocks") if m.block != last else ""
        yield m, title
        last = m.block


def _range(numbers: list[int]) -> str:
    """Return ascending numbers as text, such as ``blocks 0, 2 to 4``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs]
    return ("blocks " if len(numbers) > 1 else "block ") + ", ".join(texts)


def _widths(plan: Any) -> str:
    if plan.recipe.rotation == "online":
        return "all rotated widths"
    return f"intermediate {plan.dimensions.intermediate}"


def _side(side: Any, prefix: str) -> str:
    permuted = "permuted, " if side.permutation is not None else ""
    if side.rotation is None:
        return permuted.rstrip(", ")
    return f"{permuted}{prefix}rotated {side.rotation}"

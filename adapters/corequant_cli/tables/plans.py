"""Plans: what is done to matrices and tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from corequant_cli.tables.console import column, console, marked, table

__all__ = ["fates", "plan_dict", "plan_table", "sizes", "sizes_if_tied"]

_NAME = 24
"""Columns of a terminal that names of matrices take at most."""

_PRICE = {
    "heads": "but the residual stream isn't rotated, and the result loses more",
    "online": "but the inputs of all layers are rotated at run time",
}
_BYTES = {"llama.cpp": "int8:group32", "vllm": ""}
"""8-bit quantizers of embedding and head for readers that don't take int8 by channel."""

_WORTH_SAYING = 0.1
"""Share of a result's size that another option must save to be mentioned."""


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
    console().print(
        f"[bold]{kind}[/bold]: {sizes.blocks} blocks, hidden {sizes.hidden}, intermediate "
        f"{sizes.intermediate}, head {sizes.head_dim}\n"
    )
    blocks = _kinds_of_blocks(plan)
    shown = list(_examples(plan, blocks))
    width = min(max(len(_own_name(plan, m)) for m, _ in shown), _NAME)
    grid = table(
        column("matrix", overflow="fold", width=width), column("shape", no_wrap=True), "reads",
        "writes", column("rounded", no_wrap=True), box=None, padding=(0, 1, 0, 0),
    )  # fmt: skip
    schemes = Counter((m.weights, m.activations) for m in plan.quantized)
    names = _names_of({weights for weights, _ in schemes})
    for m, title in shown:
        if title and len(blocks) > 1:
            grid.add_row(f"[italic]{title}[/italic]")
        rounded = names[m.weights] if m.quantized and len(schemes) > 1 else "yes"
        grid.add_row(
            marked(_own_name(plan, m)),
            "×".join(map(str, m.shape)),
            _read(m, folds=plan.folds_norm(m)),
            ", ".join(filter(None, dict.fromkeys(_side(p.output, "") for p in m.row_slices))),
            rounded if m.quantized else "",
        )
    console().print(grid)
    console().print()
    for note in plan.notes:
        console().print(f"note: {marked(note)}")
    cost = plan.cost()
    for (weights, activations), count in schemes.items():
        layers = f"{count} × " if len(schemes) > 1 else ""
        console().print(f"{layers}weights {weights}, activations {activations or 'float'}")
    console().print(f"everything else {plan.recipe.dtype}, {_vocabulary(plan)}")
    if cost["online_rotations"]:
        console().print(
            f"rotations at run time: {cost['online_rotations']}, "
            f"{cost['online_additions_per_token']:,} additions per token "
            f"({cost['online_share']:.2%} of the linear layers' multiplications), "
            f"{cost['online_bytes_per_token'] / 1024:.0f} KiB read and written"
        )
        sizes_of = ", ".join(map(str, cost["block_sizes"]))
        console().print(f"valid block sizes for {_widths(plan)}: {sizes_of}")
    else:
        console().print("no rotations at run time")
    bits = 32 * cost["quantized_mib"] / cost["float_mib"]
    console().print(
        f"quantized weights: {cost['quantized_mib'] * 2**20 / 1e6:.1f} MB, {bits:.2f} bits each "
        f"with their scales; quantizing takes about {cost['peak_mib']:.0f} MiB of memory"
    )


def _own_name(plan: Any, m: Any) -> str:
    """Return a matrix's name, within its block if it is in one."""
    path = "" if m.block is None else plan.architecture.block_path(m.block) + "."
    return str(m.name.removeprefix(path))


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


def sizes_if_tied(size: int | None, tied: int | None, rotation: str, reader: str) -> None:
    """Print how much smaller the result is with one matrix for embedding and head, if it is.

    Parameters
    ----------
    size, tied : int, optional
        Size of the result in bytes, as planned and with one matrix.
    rotation : str
        Value of ``--rotation`` with which there is one matrix.
    reader : str
        Program that the result is for.
    """
    if size is None or tied is None or size - tied < _WORTH_SAYING * size:
        return
    spec = _BYTES.get(reader, "int8:channel")
    halved = f"; --embeddings {spec} --head {spec} halve it" if spec else ""
    console().print(
        f"{(size - tied) / 1e6:.1f} MB of it ({1 - tied / size:.0%}) are there because embedding "
        f"and head don't stay one matrix. With --rotation {rotation} they do: "
        f"{tied / 1e6:.1f} MB, {_PRICE[rotation]}{halved}"
    )


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


def _read(m: Any, *, folds: bool) -> str:
    """Say what is merged into a matrix on the side of its inputs."""
    side = _side(m.input, "online " if m.online else "")
    return ", ".join(filter(None, ["norm" if folds else "", side]))


def _side(side: Any, prefix: str) -> str:
    permuted = "permuted, " if side.permutation is not None else ""
    if side.rotation is None:
        return permuted.rstrip(", ")
    return f"{permuted}{prefix}rotated {side.rotation}"

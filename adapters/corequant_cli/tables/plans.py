"""What a plan does to matrices and tensors."""

from __future__ import annotations

from typing import Any

from corequant_cli.tables.console import column, console, marked, table

__all__ = ["fates", "plan_dict", "plan_table"]


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
        **plan.cost(),
        "matrices": [
            {
                "name": m.name,
                "shape": list(m.shape),
                "norm": m.norm if plan.folds else None,
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
    kinds: dict[tuple[tuple[str, int, int], ...], int] = {}
    for i in range(sizes.blocks):
        kinds.setdefault(tuple((m.role, *m.shape) for m in plan.matrices if m.block == i), i)
    for m in plan.matrices:
        # One block of each kind stands for all, and so does one expert.
        if m.expert or (m.block is not None and m.block not in kinds.values()):
            continue
        path = "" if m.block is None else plan.architecture.block.format(m.block) + "."
        grid.add_row(
            marked(m.name.removeprefix(path)),
            "×".join(map(str, m.shape)),
            "norm" if plan.folds and m.norm is not None else "",
            _side(m.input, "online " if m.online else ""),
            ", ".join(filter(None, dict.fromkeys(_side(p.output, "") for p in m.row_slices))),
            "yes" if m.quantized else "",
        )
    console().print(grid)
    for note in plan.notes:
        console().print(f"note: {marked(note)}")
    cost = plan.cost()
    recipe = plan.recipe
    console().print(f"weights {recipe.weights}, activations {recipe.activations or 'float'}")
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


def _widths(plan: Any) -> str:
    if plan.recipe.rotation == "online":
        return "all rotated widths"
    return f"intermediate {plan.dimensions.intermediate}"


def _side(side: Any, prefix: str) -> str:
    permuted = "permuted, " if side.permutation is not None else ""
    if side.rotation is None:
        return permuted.rstrip(", ")
    return f"{permuted}{prefix}rotated {side.rotation}"

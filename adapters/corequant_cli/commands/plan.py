"""``corequant plan``."""

from __future__ import annotations

from corequant.recipe import READERS, Recipe
from corequant_cli.commands.architectures import takes_architecture
from corequant_cli.commands.arguments import (
    CalibrationFiles,
    Json,
    Model,
    load_adapter,
    print_json,
    read_data,
)
from corequant_cli.commands.options import takes_recipe
from corequant_cli.tables import data, plans

__all__ = ["plan"]


@takes_architecture
@takes_recipe
def plan(
    model: Model,
    *,
    calibration: CalibrationFiles = None,
    recipe: Recipe,
    reader: str,
    as_json: Json = False,
) -> None:
    """Print what quantize would do to each matrix, its cost and size, and its calibration data."""
    documents = read_data(calibration) if calibration else None
    import corequant_transformers as cqhf

    load_adapter()
    from corequant_transformers.calibration.data.given import take_windows
    from corequant_transformers.exports.destination import Destination
    from corequant_transformers.exports.sizes import sizes_if_tied

    table, source = cqhf.plan(model, recipe, reader=reader), cqhf.Source(model)
    Destination("", reader).check_plan(table, source.config(), source)
    sizes = cqhf.sizes(table, model)
    at_run_time = reader == "corequant" and table.recipe.rotation == "merged"
    rotation = "online" if at_run_time else "heads"
    tied = sizes_if_tied(table, model, rotation)
    taken = None
    if documents is not None:
        taken = take_windows(documents, recipe, source.tokenizer()).data
    if as_json:
        shown = {**plans.plan_dict(table), "sizes": sizes}
        if tied is not None:
            shown["sizes_if_tied"] = {"rotation": rotation, **tied}
        print_json(shown if taken is None else {**shown, "calibration": taken})
        return
    plans.plan_table(table)
    plans.sizes(sizes)
    if tied is not None:
        layout = READERS[reader]
        plans.sizes_if_tied(sizes[layout], tied[layout], rotation, reader)
    if taken is not None:
        data.taken("to be calibrated on", taken)

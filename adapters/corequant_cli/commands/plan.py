"""``corequant plan``."""

from __future__ import annotations

from corequant.recipe import Recipe
from corequant_cli.commands.arguments import Json, Model, load_adapter, print_json
from corequant_cli.commands.options import takes_recipe
from corequant_cli.tables import plans

__all__ = ["plan"]


@takes_recipe
def plan(model: Model, recipe: Recipe, reader: str, as_json: Json = False) -> None:
    """Print what quantize would do to each matrix, and its cost."""
    import corequant_transformers as cqhf

    load_adapter()
    table = cqhf.plan(model, recipe)
    if as_json:
        print_json(plans.plan_dict(table))
    else:
        plans.plan_table(table)

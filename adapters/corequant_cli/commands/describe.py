"""``corequant describe``."""

from __future__ import annotations

from corequant_cli.commands.arguments import Json, Model, load_adapter, print_json
from corequant_cli.tables.console import plain

__all__ = ["describe"]


def describe(model: Model, *, as_json: Json = False) -> None:
    """Print the description of a model's architecture as TOML.

    For a model type that is neither described nor recognized, this is a draft whose comments say
    what is unclear. Edit it and pass it to plan and quantize with --architecture. Weights are not
    read.
    """
    import corequant_transformers as cqhf

    load_adapter()
    found = cqhf.describe(model)
    if as_json:
        print_json({"model": str(model), **found.to_dict()})
    else:
        print("\n".join(plain(line) for line in found.to_toml().splitlines()))

"""Names that a model's tensors have in the files that Transformers writes, and vLLM reads.

Transformers' classes hold the experts of a layer as one parameter, its files a matrix for each
expert, as they were published. Which name a matrix has there is asked of the conversion that
Transformers itself carries out when it saves a model.

Source: ``core_model_loading`` and ``conversion_mapping`` of Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    revert_weight_conversion,
)

from corequant.errors import ArchitectureError
from corequant_transformers.exports.own_class import fused_experts
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["SavedNames", "saved_names"]


@dataclass(frozen=True, eq=False)
class SavedNames:
    """From names in a plan to names in files.

    Attributes
    ----------
    experts : mapping of str to str
        Modules of experts, by their names in the plan.
    renamings : list
        Transformers' renamings of everything else.
    converters : list
        Its conversions, which leave no name to a tensor alone.
    """

    experts: Mapping[str, str]
    renamings: list[WeightRenaming]
    converters: list[WeightConverter]

    def tensor(self, name: str) -> str:
        """Return a tensor's name in files."""
        module, _, last = name.rpartition(".")
        if module in self.experts:
            return f"{self.experts[module]}.{last}"
        if apply_converters(name, self.converters)[1] is not None:
            return name
        return str(apply_renamings(name, self.renamings))

    def module(self, name: str) -> str:
        """Return the name that a module's tensors have in common in files."""
        return self.tensor(f"{name}.weight").removesuffix(".weight")


def saved_names(model: Any, plan: ModelPlan) -> SavedNames:
    """Return the names that tensors have in files.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model of Transformers' own class; its weights are not read.
    plan : ModelPlan

    Raises
    ------
    ArchitectureError
        If files hold the experts of a layer as one tensor, too.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> from corequant_transformers.exports.saved_names import saved_names
    >>> model = cqhf.tiny_model("mixtral")
    >>> names = saved_names(model, cqhf.plan(model, Recipe(block_size=16)))
    >>> names.module("model.layers.1.mlp.experts.3.down_proj")
    'model.layers.1.block_sparse_moe.experts.3.w2'
    """
    # A model that wasn't loaded may have had a prefix; none is written.
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    reverse = [t.reverse_transform() for t in mapping[::-1] if not isinstance(t, PrefixChange)]
    return SavedNames(
        _experts(model, plan),
        [t for t in reverse if isinstance(t, WeightRenaming)],
        [t for t in reverse if isinstance(t, WeightConverter)],
    )


def _experts(model: Any, plan: ModelPlan) -> dict[str, str]:
    e, count = plan.architecture.experts, plan.dimensions.experts
    paths = dict(fused_experts(model, plan))
    if e is None or not paths:
        return {}
    found: dict[str, str] = {}
    for parameter, parts in ((e.fused_gate_up, (e.gate, e.up)), (e.fused_down, (e.down,))):
        # One number for each matrix, by which it is known again wherever it arrives.
        size = (count, len(parts), 1)
        numbers = torch.arange(count * len(parts)).reshape(size)
        step = numbers.numel()
        marked = {
            f"{path}.{parameter}": numbers + i * step for i, path in enumerate(paths.values())
        }
        for name, value in revert_weight_conversion(model, marked).items():
            if value.numel() != 1 or value.ndim != 2 or not name.endswith(".weight"):
                raise ArchitectureError(
                    f"{name} of {plan.architecture.model_type!r} holds several experts' matrices "
                    "in Transformers' files, and compressed-tensors has codes for single matrices "
                    "only"
                )
            block, rest = divmod(int(value), step)
            expert, part = divmod(rest, len(parts))
            module = f"{list(paths.values())[block]}.{expert}.{parts[part]}"
            found[module] = name.removesuffix(".weight")
    return found

"""Language models that read images as well: LLaVA, Mistral 3, Gemma 3, Qwen-VL."""

from __future__ import annotations

from corequant_transformers.architectures.composite import Composite
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.writer import Writer

__all__ = ["COMPOSITES"]

_TOWER = ("model.vision_tower", "model.multi_modal_projector")
_PROJECTED = (Writer("model.multi_modal_projector.linear_2.weight"),)
_VISUAL = ("model.visual",)

_DESCRIBED = (
    Composite("llava", _TOWER, _PROJECTED),
    Composite("mistral3", _TOWER, _PROJECTED),
    Composite(
        "gemma3",
        _TOWER,
        (Writer("model.multi_modal_projector.mm_input_projection_weight", transposed=True),),
    ),
    Composite(
        "qwen2_5_vl",
        _VISUAL,
        (Writer("model.visual.merger.mlp.2.weight"),),
        Architecture("qwen2_5_vl_text"),
    ),
    Composite(
        "qwen3_vl",
        _VISUAL,
        (
            Writer("model.visual.merger.linear_fc2.weight"),
            # Their outputs are added to the stream after the first blocks.
            Writer("model.visual.deepstack_merger_list.{}.linear_fc2.weight"),
        ),
        Architecture("qwen3_vl_text"),
    ),
)

COMPOSITES = {composite.model_type: composite for composite in _DESCRIBED}
"""By model type."""

"""A model type by somebody else: no name is one of a described model's.

The file is given to ``--architecture`` as it is, so that it registers its classes itself.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import corequant_transformers as cqhf


class TowerConfig(PreTrainedConfig):
    """Fields under names of its own."""

    model_type = "tower"

    def __init__(self, floor_width=192, **fields):
        self.floor_width = floor_width
        usual = {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        }
        super().__init__(**{**usual, **fields})
        for name, value in usual.items():
            setattr(self, name, fields.get(name, value))


class Floor(nn.Module):
    """A decoder block."""

    def __init__(self, config):
        super().__init__()
        width, self.channels = config.hidden_size, config.hidden_size // config.num_attention_heads
        few = config.num_key_value_heads * self.channels
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.asks, self.answers = nn.Linear(width, width), nn.Linear(width, few + few)
        self.tells = nn.Linear(width, width)
        self.widens = nn.Linear(width, config.floor_width)
        self.narrows = nn.Linear(config.floor_width, width)

    def forward(self, hidden_states):
        """Add what the block has to add."""
        read = self.before(hidden_states)
        heads = [
            each.unflatten(-1, (-1, self.channels)).transpose(1, 2)
            for each in (self.asks(read), *self.answers(read).chunk(2, -1))
        ]
        found = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        x = hidden_states + self.tells(found.transpose(1, 2).flatten(-2))
        return x + self.narrows(gelu(self.widens(self.between(x))))


class TowerModel(PreTrainedModel):
    """Embedding, blocks and the final norm."""

    config_class = TowerConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.floors = nn.ModuleList(Floor(config) for _ in range(config.num_hidden_layers))
        self.roof = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        """Return the last hidden states."""
        x = self.words(input_ids)
        for floor in self.floors:
            x = floor(x)
        return BaseModelOutput(last_hidden_state=self.roof(x))


class TowerForCausalLM(PreTrainedModel, GenerationMixin):
    """With a head."""

    config_class = TowerConfig
    base_model_prefix = "tower"

    def __init__(self, config):
        super().__init__(config)
        self.tower = TowerModel(config)
        self.view = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        """Return logits."""
        return CausalLMOutput(logits=self.view(self.tower(input_ids).last_hidden_state))


AutoConfig.register("tower", TowerConfig, exist_ok=True)
AutoModelForCausalLM.register(TowerConfig, TowerForCausalLM, exist_ok=True)

ARCHITECTURE = cqhf.Architecture(
    "tower",
    embedding="tower.words",
    final_norm="tower.roof",
    head="view",
    block="tower.floors.{}",
    norm="layer",
    attention_norm="before",
    query="asks",
    key="answers",
    value="answers",
    attention_output="tells",
    mlp_norm="between",
    gate=None,
    up="widens",
    down="narrows",
    intermediate_size="floor_width",
)


def tower():
    """Return a random model."""
    torch.manual_seed(0)
    model = TowerForCausalLM(TowerConfig()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(float(name.endswith("weight")), 0.3)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model

"""Models with Llama's modules that are wired in another way, one wire each."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}

WRONG = (
    "norms exchanged",
    "norms after attention and MLP",
    "parallel behind one norm",
    "a gain left out",
    "a gain applied twice",
    "branch scaled by channel",
    "activation on the other factor",
    "activation on the product",
    "activation before the sum",
    "query norm before the projection",
    "values of the stream itself",
    "heads interleaved before the output projection",
    "stream clipped",
    "final norm twice",
)
"""Wires that the transforms of a Llama don't leave alone."""

HARMLESS = ("as llama", "parallel behind two norms", "branch scaled", "keys scaled")
"""Wires that they do: what a description leads to is right for these models as well."""


class WiredConfig(LlamaConfig):
    """Llama's fields and the name of a wire."""

    model_type = "wired"
    wire: str = "as llama"


class _Attention(LlamaAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.wire = config.wire
        if self.wire == "query norm before the projection":
            self.q_norm = LlamaRMSNorm(config.hidden_size)

    def forward(self, hidden_states, stream, position_embeddings, **kwargs):
        x, wire = hidden_states, self.wire
        query = self.q_norm(x) if wire == "query norm before the projection" else x
        read = [query, x, stream if wire == "values of the stream itself" else x]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        heads = [
            layer(each).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, each in zip(layers, read, strict=True)
        ]
        heads[:2] = apply_rotary_pos_emb(*heads[:2], *position_embeddings)
        if wire == "keys scaled":
            heads[1] = 2 * heads[1]
        found = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        if wire == "heads interleaved before the output projection":
            return self.o_proj(found.permute(0, 2, 3, 1).flatten(-2))
        return self.o_proj(found.transpose(1, 2).flatten(-2))


class _MLP(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.wire = config.wire

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.wire == "activation on the other factor":
            return self.down_proj(gate * silu(up))
        if self.wire == "activation on the product":
            return self.down_proj(silu(gate * up))
        return self.down_proj(silu(gate) * up)


class _Layer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn, self.mlp = _Attention(config, layer_idx), _MLP(config)
        self.wire = config.wire

    def forward(self, hidden_states, **kwargs):
        x, n1, n2, mlp = (
            hidden_states,
            self.input_layernorm,
            self.post_attention_layernorm,
            self.mlp,
        )
        ramp = torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype)

        def attention(read):
            return self.self_attn(read, x, **kwargs)

        match self.wire:
            case "norms exchanged":
                x = x + attention(n2(x))
                return x + mlp(n1(x))
            case "norms after attention and MLP":
                x = x + n1(attention(x))
                return x + n2(mlp(x))
            case "parallel behind one norm":
                return x + attention(n1(x)) + n2(mlp(n1(x)))
            case "parallel behind two norms":
                return x + attention(n1(x)) + mlp(n2(x))
            case "a gain left out":
                x = x + attention(n1(x))
                return x + mlp(n2(x) / n2.weight)
            case "a gain applied twice":
                x = x + attention(n1(x) * n1.weight)
                return x + mlp(n2(x))
            case "branch scaled by channel":
                x = x + attention(n1(x)) * ramp
                return x + mlp(n2(x))
            case "branch scaled":
                x = x + 0.3 * attention(n1(x))
                return x + mlp(n2(x))
            case "activation before the sum":
                x = x + attention(n1(x))
                return x + torch.tanh(mlp(n2(x)))
            case "stream clipped":
                x = (x + attention(n1(x))).clamp(-1, 1)
                return x + mlp(n2(x))
        x = x + attention(n1(x))
        return x + mlp(n2(x))


class WiredForCausalLM(LlamaForCausalLM):
    """A Llama with the wire that its config names."""

    config_class = WiredConfig

    def __init__(self, config):
        super().__init__(config)
        layers = [_Layer(config, i) for i in range(config.num_hidden_layers)]
        self.model.layers = nn.ModuleList(layers)

    def forward(self, input_ids, **kwargs):
        """Return logits alone."""
        found = self.model(input_ids=input_ids, **kwargs)
        x = found.last_hidden_state
        if self.config.wire == "final norm twice":
            x = self.model.norm(x)
        return CausalLMOutputWithPast(logits=self.lm_head(x))


AutoConfig.register(WiredConfig.model_type, WiredConfig, exist_ok=True)
AutoModelForCausalLM.register(WiredConfig, WiredForCausalLM, exist_ok=True)


def wired(wire, *, neutral=False):
    """Return a random model; ``neutral`` with gains of 1."""
    torch.manual_seed(0)
    model = WiredForCausalLM(WiredConfig(wire=wire, **SIZES)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0) if neutral else parameter.normal_(1.0, 0.3)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model

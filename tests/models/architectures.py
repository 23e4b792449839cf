"""A tiny model of each kind of model that people have, and what becomes of it.

``test_architecture_rows`` proves each row. ``python -m tests.models.architectures`` writes the
README's list and the table of ``docs/architectures.md`` from the rows; with names of rows it tries
these, with ``all`` every one, and prints what becomes of them.
"""

from __future__ import annotations

import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import corequant_transformers as cqhf
from corequant.errors import CorequantError
from corequant.recipe import Recipe
from corequant_transformers.architectures.known import UnknownArchitectureError, architecture_of
from corequant_transformers.model.gguf_files.dialects import dialect_of
from corequant_transformers.model.loaders import load_model, make_model

ROOT = Path(__file__).parents[2]
START, END = "<!-- architectures -->", "<!-- end of architectures -->"

RECIPE = Recipe(block_size=16)
EXPORTED = Recipe(rotation="heads", weights="int4:group16", activations=None)
TOKENS = np.random.default_rng(0).integers(3, 128, (2, 24))

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 16}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
EMBEDDED = {
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
}
SMALL = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "tie_word_embeddings")}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Row:
    """A model.

    Attributes
    ----------
    label, kind : str
        What people call it, and its model type.
    fields : dict
        Fields of its config.
    """

    label: str
    kind: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def refused(self) -> str:
        """Pattern of the error's message; empty for a model that works."""
        return REFUSED.get(self.label, ("", ""))[0]

    @property
    def why(self) -> str:
        """Why it is refused, in a few words."""
        return REFUSED[self.label][1]

    @property
    def unexported(self) -> str:
        """Pattern of what an export to compressed-tensors is refused with; empty if it works."""
        return UNEXPORTED.get(self.label, "")

    def config(self) -> Any:
        """Return the config."""
        # Its models are written to files that are read again.
        return transformers.AutoConfig.for_model(self.kind, **self.fields)

    def model(self) -> Any:
        """Return a random model, with random gains and biases."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.kind in _NO_DECODERS:
                made = transformers.AutoModel.from_config(self.config(), dtype=torch.float32)
            else:
                made = make_model(self.config(), dtype=torch.float32)
        for name, parameter in made.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                if parameter.ndim == 1:
                    parameter.nan_to_num_(0.0).clamp_(-2, 2).add_(0.1 * drawn)
                else:
                    parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
        return made.eval().requires_grad_(False)


def _row(label: str, kind: str, **fields: Any) -> Row:
    return Row(label, kind, {**BASE, **fields})


def _around(label: str, kind: str, text: dict[str, Any], vision: dict[str, Any], **own: Any) -> Row:
    fields = {"text_config": {**BASE, **text}, "vision_config": vision, **own}
    return Row(label, kind, {"tie_word_embeddings": False, **fields})


ROWS = (
    _row("Llama", "llama"),
    _row("Mistral", "mistral", **HEADS),
    _row("Mixtral", "mixtral", **EXPERTS),
    _row("Qwen2", "qwen2"),
    _row("Qwen2-MoE", "qwen2_moe", **EXPERTS),
    _row("Qwen3", "qwen3", **HEADS),
    _row("Qwen3-MoE", "qwen3_moe", **EXPERTS, **HEADS),
    _row("Qwen3-Next", "qwen3_next", **EXPERTS, **HEADS, **LINEAR),
    _row("Qwen3.5 text", "qwen3_5_text", **HEADS, **LINEAR),
    _row("Gemma", "gemma", **HEADS),
    _row("Gemma 2", "gemma2", **HEADS, **SLIDING, query_pre_attn_scalar=16),
    _row("Gemma 3 text", "gemma3_text", **HEADS, **SLIDING, query_pre_attn_scalar=16),
    _row(
        "Gemma 3n text",
        "gemma3n_text",
        **HEADS,
        **EMBEDDED,
        laurel_rank=8,
        altup_num_inputs=2,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    _row("Gemma 4 text", "gemma4_text", **HEADS, **EMBEDDED, **SLIDING, global_head_dim=16),
    _row("Phi-2", "phi"),
    _row("Phi-3", "phi3"),
    _row("Phi-4", "phi3", partial_rotary_factor=1.0),
    _row("PhiMoE", "phimoe", **EXPERTS),
    _row("OLMo", "olmo"),
    _row("OLMo 2", "olmo2"),
    _row("OLMo 3", "olmo3", **SLIDING),
    _row("OLMoE", "olmoe", **EXPERTS),
    _row("SmolLM3", "smollm3"),
    _row("Granite", "granite"),
    _row("GraniteMoE", "granitemoe", **EXPERTS),
    _row(
        "Granite 4 hybrid",
        "granitemoehybrid",
        **EXPERTS,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=32,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
    ),
    _row("GLM 4", "glm4", **HEADS),
    _row("GLM", "glm", **HEADS),
    _row("GLM4-MoE", "glm4_moe", **EXPERTS, **HEADS),
    _row("Cohere", "cohere"),
    _row("Cohere 2", "cohere2"),
    _row("DeepSeek-V2", "deepseek_v2", **{**EXPERTS, **LATENT}),
    _row("DeepSeek-V3", "deepseek_v3", **{**EXPERTS, **LATENT}),
    _row("gpt-oss", "gpt_oss", **EXPERTS, **HEADS, **SLIDING),
    _row("Ernie 4.5", "ernie4_5", **HEADS),
    _row(
        "Ernie 4.5-MoE",
        "ernie4_5_moe",
        **EXPERTS,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    _row("Falcon", "falcon", ffn_hidden_size=96, new_decoder_architecture=False, multi_query=True),
    _row("Falcon 40B", "falcon", ffn_hidden_size=96, num_kv_heads=2, new_decoder_architecture=True),
    _row(
        "Falcon-H1",
        "falcon_h1",
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
    ),
    _row("StableLM", "stablelm"),
    _row("GPT-NeoX, Pythia", "gpt_neox"),
    _row("BLOOM", "bloom", n_layer=2, n_head=4),
    _row("MPT", "mpt", d_model=64, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128),
    _row("GPT-J", "gptj", **GPT, rotary_dim=8),
    Row("GPT-2", "gpt2", {**SMALL, **GPT, "tie_word_embeddings": False}),
    Row("OPT", "opt", {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    Row("GPT-BigCode", "gpt_bigcode", {**SMALL, **GPT}),
    _row("StarCoder2", "starcoder2"),
    _row("Nemotron", "nemotron", **HEADS),
    _row(
        "Nemotron-H",
        "nemotron_h",
        **HEADS,
        hybrid_override_pattern="*-",
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=16,
    ),
    _row("InternLM3", "internlm3"),
    _row("Hunyuan dense", "hunyuan_v1_dense", **HEADS),
    _row("Hunyuan-MoE", "hunyuan_v1_moe", **EXPERTS, **HEADS),
    _row("EXAONE 4", "exaone4", **SLIDING),
    _row("Seed-OSS", "seed_oss", **HEADS),
    _row(
        "LFM2",
        "lfm2",
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        block_ff_dim=96,
    ),
    _row(
        "MiniMax",
        "minimax",
        **EXPERTS,
        **HEADS,
        layer_types=["linear_attention", "full_attention"],
        block_size=16,
    ),
    _row("MiniMax-M2", "minimax_m2", **EXPERTS, **HEADS),
    _row(
        "Llama 4 text",
        "llama4_text",
        **EXPERTS,
        **HEADS,
        intermediate_size_mlp=96,
        layer_types=["chunked_attention", "full_attention"],
        moe_layers=[1],
    ),
    _row("Ministral", "ministral", **HEADS, **SLIDING),
    _row("Ministral 3", "ministral3", **HEADS),
    _row("Apertus", "apertus", **HEADS),
    _row("Arcee", "arcee", **HEADS),
    _row("dots1", "dots1", **EXPERTS, **HEADS),
    _row("Helium", "helium", **HEADS),
    _row("BitNet", "bitnet"),
    _row("Mamba 2", "mamba2", num_heads=8, head_dim=16, n_groups=1, state_size=16),
    Row("CodeGen", "codegen", {**SMALL, **GPT, "rotary_dim": 8, "tie_word_embeddings": False}),
    Row(
        "GPT-Neo",
        "gpt_neo",
        {**SMALL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    _around(
        "Mistral 3",
        "mistral3",
        {**HEADS, "model_type": "mistral"},
        {**VISION, "model_type": "pixtral", "head_dim": 16},
        image_token_index=5,
    ),
    _around(
        "LLaVA",
        "llava",
        {**HEADS, "model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=5,
    ),
    _around(
        "Gemma 3",
        "gemma3",
        {**HEADS, **SLIDING, "model_type": "gemma3_text", "query_pre_attn_scalar": 16},
        {**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=5,
    ),
    _around(
        "Qwen2.5-VL",
        "qwen2_5_vl",
        {"model_type": "qwen2_5_vl_text", "rope_parameters": ROPE},
        {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "fullatt_block_indexes": [0],
        },
        image_token_id=5,
        vision_start_token_id=6,
    ),
    _around(
        "Qwen3-VL",
        "qwen3_vl",
        {**HEADS, "model_type": "qwen3_vl_text", "rope_parameters": ROPE},
        {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        image_token_id=5,
        vision_start_token_id=6,
    ),
    Row("BERT", "bert", {**SMALL, "architectures": ["BertForMaskedLM"]}),
    Row("RoBERTa", "roberta", {**SMALL, "architectures": ["RobertaForMaskedLM"]}),
    Row("ModernBERT", "modernbert", {**SMALL, "cls_token_id": 1, "sep_token_id": 2}),
    Row("ViT", "vit", {**VISION, "hidden_size": 64, "intermediate_size": 96}),
    Row(
        "T5",
        "t5",
        {"vocab_size": 128, "d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16},
    ),
    Row(
        "Whisper",
        "whisper",
        {
            "vocab_size": 128,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "max_source_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
)


_NO_DECODERS = ("vit", "t5", "whisper")
REFUSED: dict[str, tuple[str, str]] = {
    "Gemma 3n text": ("mix several residual streams", "several residual streams, mixed by token"),
    "Gemma 4 text": (
        "hidden_size_per_layer_input is 0, got 16",
        "an embedding for each layer; works without",
    ),
    "Granite 4 hybrid": ("num_local_experts is 0, got 4", "shared experts; works without experts"),
    "ViT": ("reads images", "reads images"),
    "Whisper": ("reads audio", "reads audio"),
}
"""Pattern of the message and reason of each row that is refused."""

_NOTHING = "the recipe does nothing"
_CHANGED = "merging changed which tensors"
UNEXPORTED: dict[str, str] = {
    "Qwen3.5 text": _NOTHING,
    "Qwen3-Next": _NOTHING,
    "Mamba 2": "sets the weight of",
    "GraniteMoE": "holds several experts' matrices",
    "Falcon": "is a FalconLinear in Transformers",
    "Falcon 40B": "is a FalconLinear in Transformers",
    "BLOOM": _CHANGED,
    "GPT-2": "is not a linear layer of its own",
    "GPT-BigCode": "sets the weight of",
    "gpt-oss": "holds several experts' matrices",
    "Llama 4 text": "holds several experts' matrices",
    "T5": _CHANGED,
    "BERT": _CHANGED,
    "RoBERTa": _CHANGED,
    "ModernBERT": "sets the weight of",
}
"""Pattern of the message for each row that works and can't be exported to compressed-tensors."""


class _Stop(Exception):
    pass


def outputs(model: Any) -> torch.Tensor:
    """Return a model's logits, or what an encoder makes of the tokens, or a decoder beside it."""
    ids = torch.from_numpy(TOKENS)
    given = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(ids, **given)[0]
    return found


def quantized(model: Any, folder: Path) -> float:
    """Quantize in memory, and from disk with a stop on the way; return the largest error.

    The directory, loaded, computes what the model in memory does to the bit.
    """
    kept = cqhf.quantize(model, RECIPE, TOKENS)
    model.save_pretrained(folder / "float")

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "quantize" and done == 2:
            raise _Stop

    try:
        cqhf.quantize(folder / "float", RECIPE, TOKENS, folder / "out", progress=stop)
        raise AssertionError("the run was not stopped")
    except _Stop:
        pass
    result = cqhf.quantize(folder / "float", RECIPE, TOKENS, folder / "out", resume=True)
    own = outputs(kept.model)
    assert torch.equal(own, outputs(cqhf.load(folder / "out")))
    change = float((own - outputs(model)).norm() / own.norm())
    assert 0.001 < change < 1.5, change
    found = result.verification
    return max(found.logits_error, *found.block_errors)


def exported(model: Any, folder: Path) -> float:
    """Export a model, and return how far Transformers' own reading is from ours."""
    kept = cqhf.quantize(model, EXPORTED, TOKENS, folder / "export", reader="transformers")
    config = transformers.AutoConfig.from_pretrained(folder / "export")
    read = load_model(str(folder / "export"), config, dtype=torch.float32)
    own = outputs(kept.model)
    return float((outputs(read) - own).norm() / own.norm())


# ---- the README's list and the page's table


def _is_found(row: Row) -> bool:
    """Return whether a working row's type is recognized rather than described."""
    try:
        architecture_of(row.config())
    except UnknownArchitectureError:
        return True
    return False


def _has_gguf(row: Row) -> bool:
    try:
        dialect_of(row.config())
    except CorequantError:
        return False
    return True


def listed() -> str:
    """Return the README's list."""
    works = [row.label for row in ROWS if not row.refused]
    refused = [row.label for row in ROWS if row.refused]
    return (
        f"{len(works)} of {len(ROWS)} kinds of models work, each proved on a tiny one: "
        f"{', '.join(works)}. Refused with the reason: {', '.join(refused)}."
    )


def table() -> str:
    """Return the table of ``docs/architectures.md``."""
    lines = [
        "| model | type | works | compressed-tensors | GGUF |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.refused:
            lines.append(f"| {row.label} | {row.kind} | no: {row.why} | | |")
            continue
        works = "as recognized" if _is_found(row) else "yes"
        marks = ["" if row.unexported else "yes", "yes" if _has_gguf(row) else ""]
        lines.append(f"| {row.label} | {row.kind} | {works} | {' | '.join(marks)} |")
    return "\n".join(lines)


def rendered(text: str, made: str) -> str:
    """Return a text with what is made between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{made}\n\n{END}{after}"


PAGES = ((ROOT / "README.md", listed), (ROOT / "docs" / "architectures.md", table))


def write() -> None:
    """Write the list and the table."""
    for page, made in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8"), made()), encoding="utf-8")


def attempt(row: Row, folder: Path) -> str:
    """Return what becomes of a row, in words."""
    try:
        model = row.model()
        said = f"works, {quantized(model, folder):.1e}"
    except CorequantError as problem:
        return f"refused: {type(problem).__name__}: {str(problem)[-300:]}"
    except Exception as problem:
        return f"CRASH {type(problem).__name__}: {str(problem)[-300:]}"
    try:
        return f"{said}, export {exported(model, folder):.1e}"
    except Exception as problem:
        return f"{said}, export {type(problem).__name__}: {str(problem)[:300]}"


def main(labels: list[str]) -> None:
    """Write the pages, or print what becomes of some rows, ``all`` of them."""
    if not labels:
        write()
        return
    transformers.logging.set_verbosity_error()
    for row in ROWS:
        if {row.label, row.kind, "all"} & set(labels):
            with tempfile.TemporaryDirectory() as folder:
                print(f"{row.label:18} {attempt(row, Path(folder))}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

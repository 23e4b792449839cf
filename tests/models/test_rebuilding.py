"""A model in memory is saved only if loading, which has its config and tensors, rebuilds it."""

import copy

import numpy as np
import pytest
import torch
import transformers

import corequant_transformers as cqhf
from corequant.errors import ArchitectureError, CheckpointError
from corequant.recipe import Recipe
from corequant_transformers.architectures.known import _KNOWN
from corequant_transformers.model.rebuilding import check_rebuilt, rebuild
from tests.models.test_described import VARIANTS

TOKENS = np.random.default_rng(0).integers(0, 128, (2, 32))
RECIPE = Recipe(block_size=16)
CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "and back": lambda m: m.bfloat16().float(),
    "double": lambda m: m.double(),
}


class Doubled(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found


class Renamed(transformers.LlamaForCausalLM):
    """Computes the same."""


def check(model):
    check_rebuilt(model, rebuild(model.config.to_json_string(use_diff=False)))


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3_text", "mixtral"])
def test_a_cast_model_is_quantized_as_it_loads(kind, cast, tmp_path):
    model = CASTS[cast](cqhf.tiny_model(kind))
    before = [b.clone() for b in model.buffers()]
    result = cqhf.quantize(model, RECIPE, TOKENS)
    result.save(tmp_path / "q")
    assert torch.equal(logits(result.model), logits(cqhf.load(tmp_path / "q")))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("kind", sorted(_KNOWN))
def test_untouched_models_pass(kind):
    for cast in (lambda m: m, *CASTS.values()):
        check(cast(cqhf.tiny_model(kind, **VARIANTS.get(kind, {}))))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.train(),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: m.gradient_checkpointing_enable(),
        lambda m: m.enable_input_require_grads(),
        lambda m: m(torch.from_numpy(TOKENS), output_hidden_states=True),
        lambda m: m.resize_token_embeddings(140, mean_resizing=False),
    ],
)
def test_what_changes_no_function_passes(change):
    model = cqhf.tiny_model("llama")
    change(model)
    check(model)
    check(torch.compile(model))


def test_a_subclass_that_overrides_nothing_passes():
    check(Renamed(cqhf.tiny_model("llama").config))


def test_a_rope_that_follows_the_length_passes_after_it_ran():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = cqhf.tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    logits(model)
    check(model)


def _own_config(model):
    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config.head_dim = 99


def _own_method(model):
    rope = model.model.rotary_emb
    rope.compute_default_rope_parameters = lambda *args: None


def _set(path, value):
    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value())

    return change


def _hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *a: None)


BLOCK = "model.layers.0"
CHANGES = {
    "activation": (
        _set(f"{BLOCK}.mlp.act_fn", torch.nn.ReLU),
        f"{BLOCK}.mlp.act_fn must be SiLUActivation .*got ReLU",
    ),
    "frequencies": (
        lambda m: m.model.rotary_emb.inv_freq.mul_(0.3),
        r"rotary_emb.inv_freq must be \[1, 0.3.*got \[0.3",
    ),
    "epsilon": (
        _set(f"{BLOCK}.input_layernorm.variance_epsilon", lambda: 10.0),
        "input_layernorm.variance_epsilon must be 1e-06 .*got 10.0",
    ),
    "config": (
        lambda m: setattr(m.config, "rms_norm_eps", 0.1),
        "input_layernorm.variance_epsilon must be 0.1 .*got 1e-06",
    ),
    "config's rope": (
        lambda m: m.config.rope_parameters.update(rope_theta=3.0),
        "rotary_emb.inv_freq must be",
    ),
    "config's activation": (
        lambda m: setattr(m.config, "hidden_act", "gelu"),
        "act_fn must be GELUActivation .*got SiLUActivation",
    ),
    "config's bias": (
        lambda m: setattr(m.config, "attention_bias", True),
        "q_proj.bias must be a tensor .*got absent",
    ),
    "rope's scale": (
        _set("model.rotary_emb.attention_scaling", lambda: 2.0),
        "rotary_emb.attention_scaling must be 1.0 .*got 2.0",
    ),
    "attention's scale": (
        _set(f"{BLOCK}.self_attn.scaling", lambda: 3.0),
        "self_attn.scaling must be 0.25 .*got 3.0",
    ),
    "causal": (
        _set(f"{BLOCK}.self_attn.is_causal", lambda: False),
        "self_attn.is_causal must be True .*got False",
    ),
    "a module's config": (_own_config, "self_attn.config.head_dim must be 16 .*got 99"),
    "head's bias": (
        _set("lm_head.bias", lambda: torch.nn.Parameter(torch.ones(128))),
        "lm_head.bias must be absent .*got a tensor",
    ),
    "layer's bias": (
        _set(f"{BLOCK}.mlp.up_proj.bias", lambda: torch.nn.Parameter(torch.ones(96))),
        "up_proj.bias must be absent .*got a tensor",
    ),
    "norm's class": (
        _set("model.norm", lambda: torch.nn.LayerNorm(48)),
        "model.norm must be LlamaRMSNorm .*got LayerNorm",
    ),
    "embedding's norm": (
        _set("model.embed_tokens.max_norm", lambda: 0.01),
        "embed_tokens.max_norm must be None .*got 0.01",
    ),
    "extra tensors": (_set("extra", lambda: torch.nn.Linear(3, 3)), "extra.weight must be absent"),
    "method": (_own_method, "rotary_emb.compute_default_rope_parameters must be its class's"),
    **{
        f"hook of {path}": (_hook(path), f"{path or 'the model'} must have no forward hooks")
        for path in (
            "",
            "lm_head",
            "model.embed_tokens",
            "model.rotary_emb",
            f"{BLOCK}.mlp",
            f"{BLOCK}.self_attn",
        )
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_loading_would_lose_is_refused_before_any_work(name, tmp_path):
    change, message = CHANGES[name]
    model = cqhf.tiny_model("llama")
    change(model)
    with pytest.raises(ArchitectureError, match=message):
        cqhf.quantize(model, RECIPE, TOKENS, tmp_path / "q")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["activation", "frequencies", "config", "hook of lm_head"])
def test_and_so_it_is_where_a_result_in_memory_is_saved(name, tmp_path):
    change, message = CHANGES[name]
    model = cqhf.tiny_model("llama")
    change(model)
    result = cqhf.quantize(model, RECIPE, TOKENS)
    with pytest.raises(ArchitectureError, match=message):
        result.save(tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_a_subclass_with_a_forward_of_its_own_is_refused(tmp_path):
    model = Doubled(cqhf.tiny_model("llama").config).eval()
    with pytest.raises(ArchitectureError, match="got Doubled with its own forward"):
        cqhf.quantize(model, RECIPE, TOKENS, tmp_path / "q")


def test_a_hook_on_the_result_is_refused_and_a_cast_of_it_is_not(tmp_path):
    result = cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, TOKENS)
    expected = logits(result.model)
    hook = result.model.lm_head.register_forward_hook(lambda *a: None)
    with pytest.raises(ArchitectureError, match="lm_head must have no forward hooks"):
        result.save(tmp_path / "q")
    hook.remove()
    result.model.double()
    result.save(tmp_path / "q")
    assert torch.equal(logits(cqhf.load(tmp_path / "q")), expected)


def test_a_config_that_builds_no_model_is_an_error():
    model = cqhf.tiny_model("llama")
    model.config.hidden_act = "nonsense"
    with pytest.raises(CheckpointError, match="the model's config can't be made into a model"):
        check(model)

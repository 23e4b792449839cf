"""The model is the caller's: it may run elsewhere meanwhile, and stays as it is, in any mode."""

from __future__ import annotations

import copy
import functools
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import corequant as cq
import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.model.replicas import replicate
from corequant_transformers.model.surroundings import quiet_transformers

RECIPE = Recipe(block_size=16)
KINDS = ("llama", "gpt2", "gemma2", "mixtral")


def contents(value):
    """Return what a value is made of, objects by their identity."""
    if isinstance(value, dict):
        return type(value), [(k, contents(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [contents(v) for v in value]
    if isinstance(value, torch.Tensor):
        return id(value), value.data_ptr(), value.dtype, value.device, value.requires_grad
    # Equal methods are made anew each time they are asked for.
    return value if isinstance(value, types.MethodType | bool | int | float | str) else id(value)


def anatomy(model):
    """Return all that belongs to a model's modules."""
    return {name: contents(module.__dict__) for name, module in model.named_modules()}


def codes(model):
    return {
        name: module.quantized.codes.tobytes() + module.quantized.scales.tobytes()
        for name, module in model.named_modules()
        if hasattr(module, "quantized")
    }


def statistics(data):
    return {name: s.mean_abs.tobytes() for name, s in data.statistics.items()}


def evaluated(model, tokens):
    return cqhf.evaluate(model, tokens).perplexity


def generated(model, tokens):
    with torch.no_grad():
        ids = torch.from_numpy(tokens[:1, :8])
        return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy().tobytes()


def calibrated(model, tokens):
    return statistics(cqhf.calibrate(model, RECIPE, tokens))


def quantized(model, tokens):
    return codes(cqhf.quantize(model, RECIPE, tokens).model)


def inspected(model, tokens):
    return cqhf.inspect(model, tokens, 16).to_dict()


def traced(model, tokens):
    double = copy.deepcopy(model).double()
    return cqhf.trace(double, cqhf.plan(model, RECIPE), tokens).logits.numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_model(kind, tokens):
    model = cqhf.tiny_model(kind)
    jobs = [evaluated, generated, calibrated, logits, quantized, evaluated, inspected]
    if kind != "mixtral":
        # Fused experts compute in float32 at most.
        jobs.append(traced)
    alone = [job(model, tokens) for job in jobs]
    before = anatomy(model)
    seen, ended = [], threading.Event()

    def watch():
        while not ended.is_set():
            if anatomy(model) != before:
                seen.append(anatomy(model))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = [pool.submit(job, model, tokens) for job in jobs]
            for job, expected, future in zip(jobs, alone, together, strict=True):
                assert future.result() == expected, job.__name__
    ended.set()
    watcher.join()
    assert not seen
    assert anatomy(model) == before


def test_threads_share_a_quantized_model(tokens):
    model = cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens).model
    jobs = [evaluated, generated, logits, evaluated]
    alone = [job(model, tokens) for job in jobs]
    before = anatomy(model)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            together = [pool.submit(job, model, tokens) for job in jobs]
            assert [future.result() for future in together] == alone
    assert anatomy(model) == before


def mixed_modes(model):
    """Put every other module into training mode."""
    for position, module in enumerate(model.modules()):
        module.training = position % 2 == 0
    return model


@pytest.mark.parametrize("mode", ["train", "mixed"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_modes_and_dropout_do_not_matter(kind, mode, tokens):
    fields = {"llama": ("attention_dropout",), "opt": ("dropout", "attention_dropout")}
    names = fields.get(kind, ("attn_pdrop", "resid_pdrop", "embd_pdrop"))
    model = cqhf.tiny_model(kind, **dict.fromkeys(names, 0.5))
    jobs = [evaluated, quantized]
    right = [job(model.eval(), tokens) for job in jobs]
    model = mixed_modes(model) if mode == "mixed" else model.train()
    before = anatomy(model)
    assert [job(model, tokens) for job in jobs] == right
    double = copy.deepcopy(model).double()
    plan = cqhf.plan(model, RECIPE)
    mixed_modes(double)
    first = cqhf.trace(double, plan, tokens)
    again = cqhf.trace(double.eval(), plan, tokens)
    assert torch.equal(first.logits, again.logits)
    assert anatomy(model) == before


def closure(model):
    trunk = model.model
    trunk.forward = lambda *args, **kwargs: type(trunk).forward(trunk, *args, **kwargs)


def method(model):
    trunk = model.model
    trunk.forward = types.MethodType(type(trunk).forward, trunk)


def partial(model):
    trunk = model.model
    trunk.forward = functools.partial(type(trunk).forward, trunk)


def of_the_whole_model(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def of_a_layer(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight)


@pytest.mark.parametrize("exchange", [closure, method, partial, of_the_whole_model, of_a_layer])
def test_exchanged_methods_are_kept(exchange, tokens):
    model = cqhf.tiny_model("llama")
    right = [job(model, tokens) for job in (evaluated, quantized)]
    exchange(model)
    before = anatomy(model)
    # Without slices of the hidden states the loss is summed in another order.
    assert evaluated(model, tokens) == pytest.approx(right[0], rel=1e-6)
    if exchange in (method, partial):
        assert quantized(model, tokens) == right[1]
    else:
        # Nobody knows what it computes, and the quantized model would go without it.
        with pytest.raises(cq.ArchitectureError, match="must run its class's forward"):
            quantized(model, tokens)
    assert anatomy(model) == before


def doubled(layer):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Doubled


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda m, a, y: 2 * y),
        lambda layer: layer.register_forward_pre_hook(lambda m, a: (2 * a[0],)),
        doubled,
    ],
)
def test_layers_that_would_lose_something_are_refused(change, tokens):
    model = cqhf.tiny_model("llama")
    change(model.model.layers[1].mlp.down_proj)
    with pytest.raises(cq.ArchitectureError, match=r"layers.1.mlp.down_proj must"):
        quantized(model, tokens)
    assert cqhf.evaluate(model, tokens).perplexity > 1


def test_an_exchanged_method_counts_in_an_evaluation(tokens):
    model = cqhf.tiny_model("llama")
    before = evaluated(model, tokens)
    trunk = model.model

    def scaled(*args, **kwargs):
        output = type(trunk).forward(trunk, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 3
        return output

    trunk.forward = scaled
    assert evaluated(model, tokens) != pytest.approx(before, rel=0.01)
    assert trunk.__dict__["forward"] is scaled


def test_hooks_see_the_run_and_stay(tokens):
    model, seen = cqhf.tiny_model("llama"), []
    right = [evaluated(model, tokens), calibrated(model, tokens)]
    handle = model.model.layers[1].register_forward_hook(lambda m, a, y: seen.append(m))
    before = anatomy(model)
    assert [evaluated(model, tokens), calibrated(model, tokens)] == right
    assert anatomy(model) == before
    # They are given modules of the run's own.
    assert seen
    assert model.model.layers[1] not in seen
    handle.remove()
    assert not model.model.layers[1]._forward_hooks


def test_what_a_config_says_about_outputs_does_not_matter(tokens):
    model = cqhf.tiny_model("llama")
    right = [evaluated(model, tokens), quantized(model, tokens)]
    model.config.output_hidden_states = True
    # Transformers puts hooks on the modules now.
    model(torch.from_numpy(tokens))
    model.config.return_dict = False
    found = cqhf.quantize(model, RECIPE, tokens)
    assert [evaluated(model, tokens), codes(found.model)] == right
    assert model.config.return_dict is False
    states = found.model(torch.from_numpy(tokens), output_hidden_states=True)
    assert len(states.hidden_states) == 3


def test_a_replica_shares_tensors_and_nothing_else():
    model = cqhf.tiny_model("llama", tie_word_embeddings=True)
    model.note = {"layers": [model.model.layers[0]], "lock": threading.Lock()}
    own = replicate(model.train())
    assert not any(m.training for m in own.modules())
    assert all(m.training for m in model.modules())
    theirs = {id(m) for m in model.modules()}
    assert not theirs & {id(m) for m in own.modules()}
    assert own.note["layers"][0] is own.model.layers[0]
    assert own.note["lock"] is model.note["lock"]
    assert own.lm_head.weight is own.model.embed_tokens.weight is model.lm_head.weight
    assert own.config is own.model.config is not model.config
    assert own.forward.__self__ is own
    own.model.layers[0].mlp.up_proj = torch.nn.Identity()
    own.model.layers[0].register_forward_hook(lambda *given: None)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert not model.model.layers[0]._forward_hooks


def test_evaluating_takes_no_memory_for_weights(tokens):
    model = cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens).model
    own = replicate(model)
    given = {n: t.data_ptr() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert given == {n: t.data_ptr() for n, t in [*own.named_parameters(), *own.named_buffers()]}
    layers = [m.get_submodule("model.layers.0.mlp.down_proj") for m in (model, own)]
    assert layers[0].quantized is layers[1].quantized


def wrapped_by_compile(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.model.layers[0].compile(backend="eager")
    return model


def with_a_compiled_layer(model):
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [wrapped_by_compile, compiled_in_place, with_a_compiled_layer, torch.nn.DataParallel],
)
def test_wrapped_models_are_those_within(wrap, tokens):
    jobs = [evaluated, quantized]
    right = [job(cqhf.tiny_model("llama"), tokens) for job in jobs]
    model = wrap(cqhf.tiny_model("llama"))
    assert [job(model, tokens) for job in jobs] == right


def test_switches_of_transformers_are_put_back_once_nobody_needs_them(monkeypatch):
    log = transformers.utils.logging
    monkeypatch.setattr(log, "_tqdm_active", True)
    before = log.get_verbosity()
    log.set_verbosity_info()
    entered, left = threading.Barrier(2), threading.Barrier(2)

    def overlap():
        with quiet_transformers():
            entered.wait()
            left.wait()

    try:
        first = threading.Thread(target=overlap)
        first.start()
        with quiet_transformers():
            entered.wait()
        # The other one still wants it.
        assert log.get_verbosity() == log.ERROR
        assert not log.is_progress_bar_enabled()
        left.wait()
        first.join()
        assert log.get_verbosity() == log.INFO
        assert log.is_progress_bar_enabled()
        with quiet_transformers():
            log.set_verbosity_debug()
        assert log.get_verbosity() == log.DEBUG
    finally:
        log.set_verbosity(before)


def test_global_generators_are_left_alone(tokens, tmp_path):
    model = cqhf.tiny_model("llama")
    cqhf.quantize(model, RECIPE, tokens, tmp_path / "own")
    state = torch.get_rng_state()
    cqhf.load(tmp_path / "own")
    assert torch.equal(state, torch.get_rng_state())


def test_tiny_models_made_at_once_are_those_made_alone():
    alone = [cqhf.tiny_model("llama", seed=s).state_dict() for s in range(4)]
    with ThreadPoolExecutor(4) as pool:
        makes = [pool.submit(cqhf.tiny_model, "llama", seed=s) for s in range(4)]
        together = [make.result().state_dict() for make in makes]
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(expected[k], found[k]) for k in expected)


# ---- models that can't be read


def empty():
    with torch.device("meta"):
        config = cqhf.tiny_model("llama").config
        return transformers.AutoModelForCausalLM.from_config(config)


def offloaded():
    import accelerate

    model = cqhf.tiny_model("llama")
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def partly_on_disk(folder):
    cqhf.tiny_model("llama").save_pretrained(folder / "m")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder / "m", device_map=places, offload_folder=folder / "off"
        )


def with_one_empty_weight():
    model = cqhf.tiny_model("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    return model


@pytest.mark.parametrize("make", [empty, offloaded, partly_on_disk, with_one_empty_weight])
def test_weights_that_are_not_in_memory_are_refused(make, tokens, tmp_path):
    model = make(tmp_path) if make is partly_on_disk else make()
    for job in (evaluated, calibrated, quantized, inspected):
        with pytest.raises(cq.BackendError, match="must be in memory.*directory"):
            job(model, tokens)
    plan = cqhf.plan(model, RECIPE)
    with pytest.raises(cq.BackendError, match="must be in memory"):
        cqhf.trace(model, plan, tokens)


def test_weights_that_are_codes_are_refused(tokens):
    model = cqhf.tiny_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    for job in (calibrated, quantized, inspected):
        with pytest.raises(cq.CheckpointError, match="up_proj.weight .* got int8"):
            job(model, tokens)
    model = cqhf.tiny_model("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    for job in (calibrated, quantized, inspected):
        with pytest.raises(cq.CheckpointError, match="quantized already"):
            job(model, tokens)


def test_a_model_that_corequant_quantized_is_refused(tokens):
    model = cqhf.quantize(cqhf.tiny_model("llama"), RECIPE, tokens).model
    for job in (calibrated, quantized, inspected):
        with pytest.raises(cq.CheckpointError, match="quantized already by corequant"):
            job(model, tokens)


def test_what_is_no_model_is_refused(tokens):
    for model in ("some/folder", torch.nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match="must be a Transformers model"):
            evaluated(model, tokens)
        with pytest.raises(TypeError, match="must be a Transformers model"):
            calibrated(model, tokens)

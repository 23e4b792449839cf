"""What passes leave out changes no bit, and is left out."""

import numpy as np
import pytest
import torch

import corequant_transformers as cqhf
from corequant.errors import OutputError
from corequant.recipe import Recipe
from corequant_transformers.rounding.block_passes import BlockPasses
from corequant_transformers.rounding.replay import (
    Records,
    left_out,
    structure_of,
    worth_recording,
)
from corequant_transformers.run.directory import RunDirectory
from corequant_transformers.run.ledger import MemoryLedger

LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 40, "head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16}
LATENT |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
KINDS = {key: {} for key in ["llama", "gemma2", "falcon", "phi", "mixtral", "olmo2"]}
KINDS |= {"deepseek_v3": LATENT}


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_the_same_to_the_bit(kind, monkeypatch):
    model = cqhf.tiny_model(kind, **KINDS[kind])
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 16))
    recipe = Recipe(block_size=8, rounding="qronos", reference="model")
    shortened = cqhf.quantize(model, recipe, tokens)
    monkeypatch.setattr(MemoryLedger, "spare", lambda self, name, shape: None)
    plain = cqhf.quantize(model, recipe, tokens)
    one, other = (r.model.state_dict() for r in (shortened, plain))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = zip(shortened.report["matrices"], plain.report["matrices"], strict=True)
    assert all(a["loss"] == b["loss"] for a, b in rows)


class Chain(torch.nn.Module):
    """Two layers in a row, twice, with a residual; ``leak`` adds the first one's output."""

    def __init__(self, leak=None):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(4))
        self.leak, self.calls = leak, []

    def forward(self, x):
        first = self._call(0, x)
        x = x + self._call(1, first.tanh())
        x = x + self._call(3, self._call(2, x).tanh())
        return x if self.leak is None else self.leak(x, first)

    def _call(self, index, x):
        if not self.layers[index](x).isnan().all():
            self.calls.append(index)
        return self.layers[index](x)


def run(
    block,
    windows,
    wanted=(1, 3),
    room=lambda name, shape: torch.empty(shape),
    proven=None,
    passing=id,
):
    """Return what every pass gives, and how often each layer computed anything."""
    groups = [[f"layers.{i}"] for i in range(4)]
    found = []
    with (
        torch.no_grad(),
        BlockPasses(
            block,
            groups,
            lambda k: block(windows[k]),
            lambda name, x, window: (x, x.clone()),
            Records(wanted, len(windows), room, proven),
        ) as passes,
    ):
        passing(passes)
        for group in range(4):
            found += [passes.reach(k, group) for k in range(len(windows))]
        found += [passes.finish(k) for k in range(len(windows))]
    return found, [block.calls.count(i) for i in range(4)]


@pytest.fixture
def windows():
    return torch.randn(6, 1, 4, 8, generator=torch.manual_seed(1))


def test_layers_before_a_recorded_input_are_left_out(windows):
    torch.manual_seed(0)
    block = Chain()
    found, calls = run(block, windows)
    block.calls.clear()
    plain, all_calls = run(block, windows, wanted=())
    assert all(map(torch.equal, found, plain))
    # Once a window in the first pass behind them, and where the first window is tried: a complete
    # pass can't do without the second layer, whose output is a part of what it gives.
    assert all_calls == [24, 18, 12, 6]
    assert calls[0] == 6 + 4
    assert calls[2] == 6 + 3
    assert calls[3] == 6 + 3


def test_blocks_of_one_structure_are_tried_once(windows):
    torch.manual_seed(0)
    first, second, proven = Chain(), Chain(), {}
    run(first, windows, proven=proven)
    found, calls = run(second, windows, proven=proven)
    assert calls == [6, 18, 6, 6]
    plain, _ = run(second, windows, wanted=())
    assert all(map(torch.equal, found, plain))
    # What needs records that another block doesn't have is tried again.
    found, _ = run(second, windows, wanted=(1,), proven=proven)
    assert all(map(torch.equal, found, plain))


def test_what_was_proven_for_another_block_is_given_up_where_it_fails(windows):
    torch.manual_seed(0)
    proven = {}
    run(Chain(), windows, proven=proven)
    for leak in (lambda x, first: x + first, lambda x, first: x + float(first.add_(1)[0, 0, 0])):
        block = Chain(leak)
        found, _ = run(block, windows, proven=dict(proven))
        plain, _ = run(block, windows, wanted=())
        assert all(map(torch.equal, found, plain))


def test_the_structure_of_a_block_is_all_but_its_numbers_and_its_place():
    model = cqhf.tiny_model("llama")
    one, other = model.model.layers[:2]
    given = {"attention_mask": None, "position_ids": torch.arange(4)}
    before = structure_of(one, given)
    assert structure_of(other, given) == before
    assert structure_of(other, {**given, "attention_mask": torch.ones(1)}) != before
    other.self_attn.sliding_window = 8
    assert structure_of(other, given) != before
    del other.self_attn.sliding_window
    other.mlp.register_forward_pre_hook(print)
    assert structure_of(other, given) != before


def test_what_is_observed_in_a_pass_is_never_what_was_left_out(windows):
    torch.manual_seed(0)
    block, observed, seen = Chain(), [], []

    def observe(module, args, output):
        observed[-1].check_observed((output,))
        seen.append((observed[-1].window, output))

    handle = block.layers[1].register_forward_hook(observe)
    run(block, windows, wanted=(1, 2, 3), passing=observed.append)
    handle.remove()
    for window, output in seen:
        assert torch.equal(output, block.layers[1](block.layers[0](windows[window]).tanh()))


@pytest.mark.parametrize("wanted", [(1,), (3,), (1, 3)])
def test_an_output_that_is_read_elsewhere_is_computed(windows, wanted):
    torch.manual_seed(0)
    block = Chain(lambda x, first: x + first)
    found, _ = run(block, windows, wanted)
    plain, _ = run(block, windows, wanted=())
    assert all(map(torch.equal, found, plain))


def test_an_output_that_is_read_for_some_windows_only(windows):
    torch.manual_seed(0)
    block = Chain(lambda x, first: x + first if x[0, 0, 0] == marked else x)
    marked = None
    marked = Chain.forward(block, windows[4])[0, 0, 0].clone()
    found, _ = run(block, windows)
    plain, _ = run(block, windows, wanted=())
    assert all(map(torch.equal, found, plain))
    assert not any(x.isnan().any() for x in found)


def test_numbers_that_are_not_finite_stay_what_they_are(windows):
    torch.manual_seed(0)
    block = Chain()
    windows[3, 0, 1, 2] = torch.inf
    found, _ = run(block, windows)
    plain, _ = run(block, windows, wanted=())
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


class Full:
    """Room that a disk stops giving after some windows."""

    def __init__(self, shape):
        self.left = 2

    def __setitem__(self, index, value):
        self.left -= 1
        if self.left < 0:
            raise OutputError("no space left")


@pytest.mark.parametrize(
    "room", [lambda name, shape: None, lambda name, shape: Full(shape)], ids=["none", "full"]
)
def test_without_room_everything_is_computed(windows, room):
    torch.manual_seed(0)
    block = Chain()
    found, calls = run(block, windows, room=room)
    plain, _ = run(block, windows, wanted=())
    assert all(map(torch.equal, found, plain))
    assert calls == [24, 18, 12, 6]


def test_attention_to_nothing_is_not_computed():
    q = torch.full((1, 2, 4, 8), torch.nan)
    v = torch.randn(1, 2, 4, 6)
    layer = torch.nn.Linear(8, 5)
    with left_out([layer]):
        assert layer(torch.ones(2, 8)).isnan().all()
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, v)
        assert attended.shape == (1, 2, 4, 6)
        assert attended.isnan().all()
        real = torch.nn.functional.scaled_dot_product_attention(q.nan_to_num(1), q.nan_to_num(1), v)
    assert real.isfinite().all()
    assert "forward" not in vars(layer)
    assert layer(torch.ones(2, 8)).isfinite().all()


def rotary(q, cos, sin):
    half = q.shape[-1] // 2
    return q * cos + torch.cat((-q[..., half:], q[..., :half]), dim=-1) * sin


@pytest.mark.parametrize(
    "function",
    [
        lambda q, x: rotary(q, x[..., :8], x[..., 8:]),
        lambda q, x: torch.nn.functional.silu(q) * x[..., :8],
        lambda q, x: x[..., :8] - q.contiguous() / 2,
        lambda q, x: 3 * torch.nn.functional.gelu(q.transpose(0, 1), approximate="tanh"),
        lambda q, x: torch.cat([q, q], -1) + x,
        lambda q, x: torch.cat([q, x], -1),
        lambda q, x: q.double() * x[..., :8],
        lambda q, x: q.nan_to_num(2) + x[..., :8],
        lambda q, x: x.clone().add_(x),
    ],
)
def test_functions_of_what_was_left_out(function):
    layer, x = torch.nn.Linear(16, 8), torch.randn(5, 3, 16)
    expected = function(torch.full((5, 3, 8), torch.nan), x)
    with left_out([layer]):
        found = function(layer(x), x)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_records_in_a_run_lie_there_as_long_as_steps_ask_for_them(tmp_path):
    run = RunDirectory(tmp_path / "a.run", {}, resume=False)
    one = run.spare("one", (2, 3))
    one[1] = torch.ones(3)
    run.commit("block-0", {}, {}, {})
    again = run.spare("one", (2, 3))
    assert torch.equal(again[1:2], torch.ones(1, 3))
    assert run.spare("one", (2, 4)).path == one.path
    run.commit("block-1", {}, {}, {})
    assert one.path.exists()
    run.commit("exit", {}, {}, {})
    assert not one.path.exists()
    run.close()


def test_windows_that_were_not_recorded_are_not_read():
    # Storage may hold what an earlier block left there.
    records = Records({1}, 3, lambda name, shape: torch.ones(shape))
    for window in range(3):
        assert records.groups == []
        records.keep(1, window, torch.zeros(1, 4))
    assert records.groups == [1]
    assert not records.read(1, 2).any()


def test_what_is_worth_recording():
    # Multi-query attention; an expert's input has some tokens only.
    assert worth_recording([(64, 64 + 16, True), (64, 64, True)]) == [1]
    assert worth_recording([(64, 32, True), (64, 64, True)]) == []
    experts = [(64, 96, True), (64, 64, True), (64, 256, False), (128, 64, False)]
    assert worth_recording(experts) == [1]

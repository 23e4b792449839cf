"""MassDiff against brevitas, the paper's own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import corequant as cq
from tests.conftest import heavy_tailed


@pytest.fixture(scope="module")
def massdiff_permute():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas.graph.permute import massdiff_permute
    return massdiff_permute


def contents(p, b):
    return {frozenset(block) for block in np.asarray(p).reshape(-1, b).tolist()}


def agree(x, ours, theirs, b):
    """Tell whether the blocks are the same, or differ only where loads tie in x's precision.

    The peer compares loads that it has summed in the dtype of its input. Its choices are replayed
    here with loads in float64: each must be the least loaded open block up to that rounding.
    """
    if contents(ours, b) == contents(theirs, b):
        return True
    mean = np.abs(x.astype(np.float64)).mean(0)
    slack = 64 * np.finfo(x.dtype).eps
    blocks = np.asarray(theirs).reshape(-1, b)
    block_of = np.empty(len(mean), int)
    block_of[blocks] = np.arange(len(blocks))[:, None]
    order = np.argsort(-mean, kind="stable")
    load, members = np.zeros(len(blocks)), np.zeros(len(blocks), int)
    for channel in order:
        j = block_of[channel]
        least = load[members < b].min()
        if load[j] > least + slack * load.max():
            return False
        load[j] += mean[channel]
        members[j] += 1
    return True


SHAPES = [(64, 96, 16), (200, 256, 32), (33, 1536, 16)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("tokens", "d", "b"), SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_same_blocks_on_heavy_tails(massdiff_permute, dtype, tokens, d, b, seed):
    x = heavy_tailed(np.random.default_rng(seed), tokens, d).astype(dtype)
    ours = cq.massdiff(cq.ActivationStats(d).update(x).mean_abs, b)
    # Given the same numbers to compute with in float64, the blocks are the same without exception.
    exact = massdiff_permute(torch.from_numpy(x.astype(np.float64)), b).numpy()
    assert contents(ours, b) == contents(exact, b)
    theirs = massdiff_permute(torch.from_numpy(x), b).numpy()
    if dtype == np.float64 or d < 1536:
        assert contents(ours, b) == contents(theirs, b)
    assert agree(x, ours, theirs, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("b", [16, 32])
def test_same_blocks_on_real_activations(massdiff_permute, down_inputs, dtype, b):
    for layer, x in down_inputs.items():
        x = x[:256].astype(dtype)
        ours = cq.massdiff(cq.ActivationStats(x.shape[1]).update(x).mean_abs, b)
        exact = massdiff_permute(torch.from_numpy(x.astype(np.float64)), b).numpy()
        assert contents(ours, b) == contents(exact, b), layer
        theirs = massdiff_permute(torch.from_numpy(x), b).numpy()
        assert agree(x, ours, theirs, b), layer


def test_the_replay_can_tell_a_wrong_partition():
    x = heavy_tailed(np.random.default_rng(0), 64, 96).astype(np.float32)
    ours = cq.massdiff(np.abs(x.astype(np.float64)).mean(0), 16)
    assert not agree(x, ours, cq.zigzag(np.abs(x.astype(np.float64)).mean(0), 16), 16)
    assert not agree(x, ours, cq.random_permutation(96, 0), 16)

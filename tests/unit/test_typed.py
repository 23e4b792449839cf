"""What a type checker sees of the public functions: ``make lint`` runs it over this file."""

import numpy as np
import pytest

import corequant as cq
from corequant.recipe import Recipe


def test_names_will_do_where_the_documentation_says_so() -> None:
    spec = cq.QuantSpec("float4_e2m1fn", "tensor_group", 16, scale_format="e4m3")
    assert str(spec) == "nvfp4"
    assert cq.QuantSpec("int4", "channel").symmetric
    recipe = Recipe(weights="int4:channel", activations="none", block_size=[16, 12])
    assert recipe.activations is None
    assert recipe.weights.format.bits == 4


def test_unknown_names_are_seen() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        cq.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_what_functions_return_has_a_type() -> None:
    stats = cq.ActivationStats(4).update(np.ones((2, 4)))
    mean: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = cq.block_mass(np.ones((1, 4)), 2)
    assert (stats.mean_abs == 1).all()
    assert mean.shape == (1, 2)

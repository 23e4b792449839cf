"""Permutations and factors of all regions of a model at once."""

from __future__ import annotations

from corequant_transformers.calibration.choices import choose
from corequant_transformers.transforms.matrices import Choices


def choose_all(plan, data, weight) -> Choices:
    """Return what ``quantize`` would choose for a plan from a calibration pass."""
    made = {region.name: choose(plan, k, data, weight) for k, region in enumerate(plan.regions)}
    permutations = {n: c.permutation for n, c in made.items() if c.permutation is not None}
    factors = {n: c.factors for n, c in made.items() if c.factors is not None}
    return Choices(permutations, {**plan.draw_signs(data.draw), **factors})

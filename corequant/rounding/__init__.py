"""Ways to round a weight: one method a module, each a pure function that returns codes."""

from corequant.rounding.nearest import round_to_nearest

__all__ = ["round_to_nearest"]

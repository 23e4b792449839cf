"""Permutations that decide which channels share a block.

A permutation ``p`` (int64, length d) stands for ``y = x[..., p]``: new channel k holds old channel
``p[k]``, and block j is ``p[j*b:(j+1)*b]``. First-order methods need one number for each channel,
second-order ones which channels are large together, and the search needs tokens.
"""

from corequant.permutation.first_order import (
    absmax,
    identity_permutation,
    invert_permutation,
    massdiff,
    random_permutation,
    repeat_permutation,
    zigzag,
)
from corequant.permutation.second_order import energydiff

__all__ = [
    "absmax",
    "energydiff",
    "identity_permutation",
    "invert_permutation",
    "massdiff",
    "random_permutation",
    "repeat_permutation",
    "zigzag",
]

"""Weights as sums of planes of signs, with parts marked by bitmaps: BiLLM and ARB-LLM."""

from __future__ import annotations

from corequant.rounding.binary.additive import Additive
from corequant.rounding.binary.arb import arb
from corequant.rounding.binary.billm import billm
from corequant.rounding.binary.partition import Partition

__all__ = ["Additive", "Partition", "arb", "billm"]

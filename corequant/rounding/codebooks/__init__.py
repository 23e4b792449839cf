"""Weights below four bits that are not on a grid: codebooks, kept outliers, and their methods.

Each coded weight restores its values and serialises to exactly ``nbytes`` bytes.
"""

from corequant.rounding.codebooks.claq import ClaqReport, claq
from corequant.rounding.codebooks.codebook import Codebook
from corequant.rounding.codebooks.coded import (
    CodedWeight,
    CodingReport,
    RoundedWeight,
    load_coded,
)
from corequant.rounding.codebooks.columns import ColumnProblem, ColumnQuantizer
from corequant.rounding.codebooks.entropy import EntropyCoded
from corequant.rounding.codebooks.levels import (
    LevelTable,
    kmeans_levels,
    kmeans_table,
    lloyd_max,
)
from corequant.rounding.codebooks.outliers import KeptOutliers, SparseOutliers
from corequant.rounding.codebooks.scaled import ColumnScaled
from corequant.rounding.codebooks.shared import SharedCodebook
from corequant.rounding.codebooks.skim import SkimReport, skim
from corequant.rounding.codebooks.watersic import watersic

__all__ = [
    "ClaqReport",
    "Codebook",
    "CodedWeight",
    "CodingReport",
    "ColumnProblem",
    "ColumnQuantizer",
    "ColumnScaled",
    "EntropyCoded",
    "KeptOutliers",
    "LevelTable",
    "RoundedWeight",
    "SharedCodebook",
    "SkimReport",
    "SparseOutliers",
    "claq",
    "kmeans_levels",
    "kmeans_table",
    "lloyd_max",
    "load_coded",
    "skim",
    "watersic",
]

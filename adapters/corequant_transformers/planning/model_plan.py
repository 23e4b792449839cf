"""Plan of a model: what is done to each matrix, decided from its config alone.

The plan is a table with a row (``MatrixPlan``) for every matrix that changes. Everything that
follows carries out rows, so each matrix can be transformed alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import divisors, join_some
from corequant.errors import BlockSizeError
from corequant.recipe import Recipe
from corequant.rotation import random_signs
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.dimensions import Dimensions, dimensions_of
from corequant_transformers.architectures.known import (
    architecture_of,
    decoder_config,
    is_shipped,
    resolved,
)
from corequant_transformers.architectures.writer import Writer
from corequant_transformers.planning.cost import cost_of
from corequant_transformers.planning.matrix_plan import (
    RESIDUAL,
    MatrixPlan,
    Region,
    Side,
    regions_of,
)
from corequant_transformers.planning.rows import plan_matrices
from corequant_transformers.planning.rules import check_rules, fusion_conflict
from corequant_transformers.planning.widths import Shares, budget_note, stand_in

__all__ = ["VERIFIED_TOKENS", "ModelPlan", "plan_model", "replan", "settle_dtype"]

VERIFIED_TOKENS = 128
"""Tokens of the first window on which the transformed model is compared with the float one."""

_BASE = 600 * 2**20
"""Memory of Python, torch, Transformers and compiled kernels before any weight is read."""

_BLOCK_BYTES = 26
"""For each weight of a decoder block: in float64, as it was and as codes, decoded, and in search of
scales."""

_VOCABULARY_BYTES = 12
"""For each weight of the embedding or the head: as it was read, in float32, and transformed."""


@dataclass(frozen=True)
class ModelPlan:
    """The table, with the model that it is about.

    Attributes
    ----------
    architecture : Architecture
    dimensions : Dimensions
    recipe : Recipe
    matrices : tuple of MatrixPlan
    norms : tuple of str
        Paths of the norms of the residual stream. Where rotations are merged their gains become 1,
        and LayerNorms become RMSNorms; otherwise they are permuted with the residual stream.
    notes : tuple of str
        What the model's structure prevents, why, and what is done instead.
    tied : bool
        Whether embedding and head are one matrix, before and after their transforms.
    inner : tuple of str
        Paths of the modules and parameters that nothing is done to.
    is_shipped : bool
        Whether the description comes with the package.
    by_expert : bool
        Whether a file's experts can be read one by one.
    outside_bytes : int
        Bytes of the float32 modules outside of the decoder, which are read at once.
    writers : tuple of Writer
        What else writes the residual stream, outside of the decoder.
    written : Side
        What happens to the channels of the residual stream as it is written.
    """

    architecture: Architecture
    dimensions: Dimensions
    recipe: Recipe
    matrices: tuple[MatrixPlan, ...]
    norms: tuple[str, ...]
    notes: tuple[str, ...] = ()
    tied: bool = False
    outside_bytes: int = 0
    writers: tuple[Writer, ...] = ()
    written: Side = field(default_factory=Side)
    inner: tuple[str, ...] = ()
    is_shipped: bool = True
    by_expert: bool = True

    def draw_signs(self, draw: int = 0) -> dict[str, npt.NDArray[np.float64]]:
        """Return the residual stream's random signs by their name.

        They come from the recipe's seed, ``draw`` telling several sets of signs apart.
        """
        if not any(RESIDUAL == m.input.factors for m in self.matrices):
            return {}
        generator = np.random.default_rng([self.recipe.seed, draw] if draw else self.recipe.seed)
        signs = random_signs(self.dimensions.hidden, generator)
        return {RESIDUAL: signs.astype(np.float64)}

    def cost(self) -> dict[str, Any]:
        """Return what the plan costs: run-time additions and bytes, sizes in MiB, block sizes.

        ``peak_mib`` is the estimated peak memory of ``quantize`` for a model on disk, whatever its
        depth.
        """
        return cost_of(self)

    def peak_bytes(self) -> int:
        """Return the estimated peak memory of quantizing a model on disk.

        Depth has no part in it, since the model is read a part at a time, and neither has the
        number of experts where a block's are read few at a time.
        """
        recipe, sizes = self.recipe, self.dimensions
        edge = max((_size(m) for m in self.matrices if m.block is None), default=0)
        blocks: dict[int, list[MatrixPlan]] = {}
        for matrix in self.matrices:
            if matrix.block is not None:
                blocks.setdefault(matrix.block, []).append(matrix)
        block = max(map(self._open_weights, blocks.values()))
        logits = 4 * 8 * VERIFIED_TOKENS * sizes.vocabulary
        widest = max(m.shape[1] for m in self.quantized)
        # Activations of one window, and the second moments of one input.
        window = 4 * recipe.sequence_length * (6 * sizes.hidden + 4 * widest)
        moments = 8 * 3 * widest**2
        running = 4 * block + window + moments
        rounding = _BLOCK_BYTES * block
        if self.needs_moments:
            rounding += moments + window
        vocabulary = _VOCABULARY_BYTES * edge + logits
        parts = (running, rounding, vocabulary, 2 * self.outside_bytes)
        return _BASE + max(parts)

    def experts_at_once(self, block: int) -> int:
        """Return how many experts of a block are in memory together; 0 if all are.

        They have no more weights than the rest of the block, but one is always there.
        """
        return self._at_once([m for m in self.matrices if m.block == block])

    def _at_once(self, rows: list[MatrixPlan]) -> int:
        experts = [m for m in rows if m.expert is not None]
        e = self.architecture.experts
        if not experts or not self.by_expert or e is None or e.scaled_inputs:
            return 0
        # Where one statistic has several experts' tokens, sums over them depend on their order;
        # trials of signs, and of widths, change all of a block and run it again and again.
        if self.recipe.sign_trials > 1 or self.recipe.bits is not None:
            return 0
        if any(m.region not in (None, m.name) for m in experts):
            return 0
        each = sum(_size(m) for m in experts if m.expert == 0)
        rest = sum(_size(m) for m in rows if m.expert is None)
        return min(max(1, rest // each), self.dimensions.experts)

    def _open_weights(self, rows: list[MatrixPlan]) -> int:
        """Return the weights of a block's rows that are in memory together."""
        count = self._at_once(rows)
        return sum(_size(m) for m in rows if m.expert is None or not count or m.expert < count)

    def share(self, matrix: MatrixPlan) -> float:
        """Return the share of the tokens that a matrix sees."""
        sizes = self.dimensions
        return 1.0 if matrix.expert is None else min(1.0, sizes.experts_chosen / sizes.experts)

    @property
    def folds(self) -> bool:
        """Whether the norms' gains are folded into the weights."""
        return _folds_gains(self.architecture, self.recipe)

    def folds_norm(self, matrix: MatrixPlan) -> bool:
        """Return whether the gain of the norm that a matrix reads is folded into it."""
        return matrix.norm is not None and (self.folds or matrix.own_norm)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The channels that are measured to choose permutations and factors."""
        return regions_of(self.matrices)

    @property
    def mlp_outputs(self) -> tuple[MatrixPlan, ...]:
        """The matrices that read an MLP's inner activation, by blocks of the recipe's size."""
        return tuple(m for m in self.matrices if m.role == "mlp_output")

    @property
    def quantized(self) -> tuple[MatrixPlan, ...]:
        """The matrices that are quantized."""
        return tuple(m for m in self.matrices if m.quantized)

    @property
    def kept(self) -> tuple[MatrixPlan, ...]:
        """The quantized matrices that are stored: a tied head has the embedding's codes."""
        return tuple(m for m in self.quantized if not (self.tied and m.role == "head"))

    @property
    def needs_moments(self) -> bool:
        """Whether a matrix is rounded for what it reads."""
        return any(m.options.needs_moments for m in self.quantized)

    @property
    def needs_float(self) -> bool:
        """Whether a matrix is rounded for what it reads in the float network, too."""
        return any(m.options.needs_float for m in self.quantized)

    @property
    def online(self) -> tuple[MatrixPlan, ...]:
        """The matrices whose inputs are rotated at run time."""
        return tuple(m for m in self.matrices if m.online)


def plan_model(config: Any, recipe: Recipe, architecture: Architecture | None = None) -> ModelPlan:
    """Decide what is done to every matrix, and refuse what can't be done.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    recipe : Recipe
    architecture : Architecture, optional
        Description of the model; by default that of its type.

    Returns
    -------
    ModelPlan

    Raises
    ------
    ArchitectureError
        If the architecture is unknown or its config malformed.
    BlockSizeError, HadamardOrderError
        If a rotation or a group doesn't fit a width; the message names the width.
    BudgetError
        If the recipe's bits can't be met; names those that can.
    RecipeError
        If signs or scales are asked for where the path isn't linear, or a rule for layers names
        none or can't be carried out.
    TypeError
        If ``recipe`` is not a Recipe.
    """
    recipe = settle_dtype(recipe, config)
    if architecture is None:
        architecture = architecture_of(config)
    else:
        architecture = resolved(architecture, config)
    sizes, inner_config = dimensions_of(config, architecture), decoder_config(config)
    matrices, notes = plan_matrices(architecture, inner_config, sizes, recipe)
    if recipe.bits is not None:
        shares = Shares.of(recipe, architecture, matrices)
        matrices, _ = plan_matrices(architecture, inner_config, sizes, stand_in(shares))
        notes = (*notes, budget_note(shares))
    tied, untied = _tie(architecture, sizes, recipe, matrices)
    blocks = tuple(architecture.in_block(inner_config, i) for i in range(sizes.blocks))
    pairs = [(architecture.block_path(i), block) for i, block in enumerate(blocks)]
    inner = [f"{path}.{norm}" for path, block in pairs for norm in block.norms]
    left = tuple(f"{path}.{name}" for path, block in pairs for name in block.untouched)
    norms = () if architecture.enclosed else (architecture.final_norm, *inner)
    conflict = None
    if recipe.layers or recipe.keep:
        check_rules(recipe, matrices)
        conflict = fusion_conflict(matrices)
    _check_groups(matrices)
    fused = () if conflict is None else (f"{conflict}; it can't load an export of this plan",)
    rare = _rare_experts(recipe, sizes, matrices)
    notes = (*notes, *untied, *fused, *rare, *_notes_outside(architecture))
    return ModelPlan(
        architecture,
        sizes,
        recipe,
        matrices,
        norms,
        notes,
        tied,
        writers=architecture.writers,
        written=Side() if architecture.enclosed else matrices[0].input,
        inner=left,
        is_shipped=is_shipped(architecture, config),
    )


def replan(plan: ModelPlan, config: Any, recipe: Recipe) -> ModelPlan:
    """Return a model's plan for another recipe, as ``plan_model``.

    Parameters
    ----------
    plan : ModelPlan
        Its notes hold on, whether matrices are tied (those of the config may not be any more), and
        how experts are read.
    config : transformers.PreTrainedConfig
    recipe : Recipe
    """
    other = plan_model(config, recipe, plan.architecture)
    if other.recipe.bits == plan.recipe.bits:
        return replace(other, tied=plan.tied, notes=plan.notes, by_expert=plan.by_expert)
    # What is said about widths that were to be chosen is over.
    before = plan_model(config, plan.recipe, plan.architecture).notes
    more = tuple(note for note in plan.notes if note not in before)
    notes = (*other.notes, *more)
    return replace(other, tied=plan.tied, notes=notes, by_expert=plan.by_expert)


def _notes_outside(a: Architecture) -> Iterator[str]:
    if a.outside:
        yield (
            f"{', '.join(a.outside)} stay as they are and are copied, but for "
            f"{', '.join(w.weight for w in a.writers)}, which follow the residual stream that "
            "they write; calibration reads only text"
        )


def _rare_experts(
    recipe: Recipe, sizes: Dimensions, matrices: Iterable[MatrixPlan]
) -> Iterator[str]:
    """Yield what happens to experts with few tokens, where anything looks at tokens."""
    rows = [m for m in matrices if m.expert is not None and m.quantized]
    if any(m.options.needs_moments or m.region == m.name for m in rows):
        count = f"an expert that fewer than {recipe.expert_tokens} calibration tokens reach"
        if recipe.rare_experts == "shared":
            yield f"{count} is permuted and rounded for all tokens of its layer"
        else:
            yield f"{count} keeps its channels in place and is rounded to nearest"


def _size(matrix: MatrixPlan) -> int:
    return matrix.shape[0] * matrix.shape[1]


def _check_groups(matrices: Iterable[MatrixPlan]) -> None:
    for what in ("weights", "activations"):
        specs = [(m, getattr(m.settings, what)) for m in matrices]
        grouped = [(m, spec.group_size) for m, spec in specs if spec and spec.group_size]
        for matrix, group in grouped:
            if matrix.shape[1] % group:
                widths = sorted({m.shape[1] for m, _ in grouped})
                works = [n for n in divisors(math.gcd(*widths)) if n > 1]
                raise BlockSizeError(
                    f"the group size of {what} must divide the inputs of every layer, got "
                    f"{group} for {matrix.name} with {matrix.shape[1]} inputs; these divide all of "
                    f"{join_some(widths)}: {join_some(works)}"
                )


# ---- what stays in float


def settle_dtype(recipe: Recipe, model: Any) -> Recipe:
    """Return a recipe that names the dtype which ``auto`` is for a model.

    Parameters
    ----------
    recipe : Recipe
    model : transformers.PreTrainedConfig or torch.Tensor
        A config or a weight, whose ``dtype`` is the model's own.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from corequant.recipe import Recipe
    >>> from corequant_transformers.planning.model_plan import settle_dtype
    >>> settle_dtype(Recipe(), SimpleNamespace(dtype="float32")).dtype
    'bfloat16'
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}")
    if recipe.dtype != "auto":
        return recipe
    own = str(getattr(model, "dtype", None)).removeprefix("torch.")
    # Float32 and float64 weights have far more digits than quantized ones.
    return replace(recipe, dtype="float16" if own == "float16" else "bfloat16")


def _folds_gains(a: Architecture, recipe: Recipe) -> bool:
    """Return whether the gains of the residual stream's norms are folded into the weights."""
    return recipe.rotation in ("merged", "offline") and a.merges and not a.enclosed


def _tie(
    a: Architecture, sizes: Dimensions, recipe: Recipe, matrices: Sequence[MatrixPlan]
) -> tuple[bool, tuple[str, ...]]:
    """Return whether embedding and head are one matrix after their transforms, and notes.

    Parameters
    ----------
    a : Architecture
    sizes : Dimensions
    recipe : Recipe
    matrices : sequence of MatrixPlan
        All rows of a plan.

    Notes
    -----
    With a rotation R of the residual stream and the gain g of the final norm, the embedding E
    becomes E R and the head, whose norm then multiplies by w, E diag(g) R diag(w)⁻¹. If E has full
    column rank, the two are equal only if diag(g) R = R diag(w): every column of R is an
    eigenvector of diag(g). One without zeros, as those of a Hadamard matrix are, is that for equal
    gains alone.
    """
    if not sizes.tied:
        return False, ()
    embedding = next(m for m in matrices if m.name == a.embedding)
    head = next(m for m in matrices if m.name == a.head)
    same = embedding.settings.weights == head.settings.weights
    if not _folds_gains(a, recipe) and embedding.input == head.input and same:
        return True, ()
    if not same:
        here, there = (m.settings.weights or recipe.dtype for m in (embedding, head))
        note = (
            f"{a.embedding} and {a.head} don't stay tied: the first is stored as {here}, "
            f"the second as {there}"
        )
        return False, (note,)
    note = (
        f"{a.embedding} and {a.head} don't stay tied: the gain of {a.final_norm} is folded into "
        "only one of them, since it doesn't commute with the rotation of the residual stream; "
        "rotation 'heads' keeps them tied"
    )
    return False, (note,)

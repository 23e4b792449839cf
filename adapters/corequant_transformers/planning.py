"""What will be done to each matrix of a model, decided from its config alone.

The plan is a table with one row for every matrix that changes (``rows``). Everything that follows
only carries out rows, so a matrix can be transformed by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import ArchitectureError, BlockSizeError, HadamardOrderError, RecipeError
from corequant.hadamard import hadamard_factors, valid_block_sizes
from corequant.recipe import Recipe
from corequant.rotation import check_block_size, random_signs
from corequant.specs import QuantSpec
from corequant_transformers.architectures import (
    Architecture,
    Dimensions,
    architecture_of,
    dimensions_of,
)
from corequant_transformers.rows import RESIDUAL, MatrixPlan, Region, Side, regions_of

__all__ = ["MatrixPlan", "ModelPlan", "Region", "Side", "check_modules", "plan_model"]


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
        Paths of the norms. Where rotations are merged their gains become 1, otherwise they are
        permuted with the residual stream.
    """

    architecture: Architecture
    dimensions: Dimensions
    recipe: Recipe
    matrices: tuple[MatrixPlan, ...]
    norms: tuple[str, ...]

    def draw_signs(self, draw: int = 0) -> dict[str, npt.NDArray[np.float64]]:
        """Return the residual stream's random signs by their name.

        They come from the recipe's seed, ``draw`` telling several sets of signs apart.
        """
        if not self.recipe.random_signs:
            return {}
        generator = np.random.default_rng([self.recipe.seed, draw] if draw else self.recipe.seed)
        signs = random_signs(self.dimensions.hidden, generator)
        return {RESIDUAL: signs.astype(np.float64)}

    def cost(self) -> dict[str, Any]:
        """Return what the plan costs: run-time additions and bytes, sizes in MiB, block sizes.

        ``peak_mib`` is the estimated peak memory of ``quantize``: the model in float64 while it is
        verified, and what torch and a window's activations take.
        """
        additions = sum(
            m.shape[1] * _additions_per_channel(m.input.rotation or 1) for m in self.online
        )
        # Each rotated channel is read and written once, in float16 as models run.
        traffic = sum(2 * 2 * m.shape[1] for m in self.online)
        products = sum(m.shape[0] * m.shape[1] for m in self.quantized)
        spec = self.recipe.weights
        stored = sum(
            m.shape[0] * (m.shape[1] * spec.format.bits / 8 + 4 * m.shape[1] / _scaled(spec, m))
            for m in self.quantized
        )
        entries = sum(m.shape[0] * m.shape[1] for m in self.matrices)
        return {
            "online_rotations": len(self.online),
            "online_additions_per_token": additions,
            "online_bytes_per_token": traffic,
            "online_share": additions / products,
            "quantized_mib": stored / 2**20,
            "float_mib": 4 * products / 2**20,
            "peak_mib": (8 * entries + 3 * 128 * 8 * self.dimensions.vocabulary) / 2**20 + 700,
            "block_sizes": self._possible_block_sizes(),
        }

    def _possible_block_sizes(self) -> list[int]:
        widths = {m.shape[1] for m in self.online} | {self.dimensions.intermediate}
        return list(valid_block_sizes(math.gcd(*widths)))

    @property
    def folds(self) -> bool:
        """Whether the norms' gains are folded into the weights."""
        return self.recipe.rotation == "merged"

    @property
    def regions(self) -> tuple[Region, ...]:
        """The channels that are measured to choose permutations and factors."""
        return regions_of(self.matrices)

    @property
    def quantized(self) -> tuple[MatrixPlan, ...]:
        """The matrices that are quantized."""
        return tuple(m for m in self.matrices if m.quantized)

    @property
    def online(self) -> tuple[MatrixPlan, ...]:
        """The matrices whose inputs are rotated at run time."""
        return tuple(m for m in self.matrices if m.online)


def plan_model(config: Any, recipe: Recipe) -> ModelPlan:
    """Decide what is done to every matrix, and refuse what can't be done.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    recipe : Recipe

    Returns
    -------
    ModelPlan

    Raises
    ------
    ArchitectureError
        If the architecture is unknown or its config malformed.
    BlockSizeError, HadamardOrderError
        If a rotation or a group doesn't fit a width; the message names the width.
    """
    architecture = architecture_of(config)
    sizes = dimensions_of(config)
    blocks = _block_sizes(recipe, sizes)
    stream = _stream(recipe, sizes)
    matrices = [
        MatrixPlan(
            architecture.embedding,
            (sizes.vocabulary, sizes.hidden),
            input=stream.written,
            quantized=False,
        )
    ]
    norms = [architecture.final_norm]
    for i in range(sizes.blocks):
        path = architecture.block.format(i)
        matrices += _attention(architecture, sizes, path, stream, recipe)
        matrices += _mlp(architecture, sizes, path, stream, blocks[i], recipe)
        norms += [f"{path}.{architecture.attention_norm}", f"{path}.{architecture.mlp_norm}"]
    matrices.append(
        MatrixPlan(
            architecture.head,
            (sizes.vocabulary, sizes.hidden),
            norm=architecture.final_norm,
            input=stream.written,
            quantized=False,
        )
    )
    _check_groups(matrices, recipe)
    return ModelPlan(architecture, sizes, recipe, tuple(matrices), tuple(norms))


@dataclass(frozen=True)
class _Stream:
    """The residual stream as it is written, and as quantized layers read it."""

    written: Side
    read: Side
    online: bool


def _stream(recipe: Recipe, sizes: Dimensions) -> _Stream:
    signs = RESIDUAL if recipe.random_signs else None
    if recipe.rotation == "merged":
        width = _rotation("residual rotation", None, "hidden_size", sizes.hidden)
        side = Side(factors=signs, rotation=width)
        return _Stream(side, side, online=False)
    block = recipe.block_size if isinstance(recipe.block_size, int) else None
    width = _rotation("block_size", block, "hidden_size", sizes.hidden)
    permuted = recipe.permutation != "identity" and width < sizes.hidden
    side = Side(permutation=RESIDUAL if permuted else None, factors=signs)
    return _Stream(side, replace(side, rotation=width), online=True)


def _attention(
    a: Architecture, sizes: Dimensions, path: str, stream: _Stream, recipe: Recipe
) -> Iterator[MatrixPlan]:
    norm = f"{path}.{a.attention_norm}"
    name = f"{path}.{a.attention_output}"
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    if stream.online:
        block = recipe.block_size if isinstance(recipe.block_size, int) else None
        width = _rotation("block_size", block, "heads times head_dim", queries)
    else:
        width = _rotation("head_block_size", recipe.head_block_size, "head_dim", sizes.head_dim)
    # A block that holds whole heads leaves nothing to balance inside them.
    inside = width < sizes.head_dim and sizes.head_dim % width == 0
    region = name if inside and recipe.permutation != "identity" else None
    group = sizes.heads // sizes.kv_heads if region else 1
    heads = sizes.kv_heads if region else 1
    for part, rows in ((a.query, queries), (a.key, keys)):
        yield MatrixPlan(
            f"{path}.{part}", (rows, sizes.hidden), norm, stream.read, online=stream.online
        )
    yield MatrixPlan(
        f"{path}.{a.value}",
        (keys, sizes.hidden),
        norm,
        stream.read,
        Side(region, rotation=None if stream.online else width, heads=heads),
        online=stream.online,
    )
    yield MatrixPlan(
        name,
        (sizes.hidden, queries),
        input=Side(region, rotation=width, heads=heads, repeat=group),
        output=stream.written,
        online=stream.online,
    )


def _mlp(
    a: Architecture,
    sizes: Dimensions,
    path: str,
    stream: _Stream,
    block: int,
    recipe: Recipe,
) -> Iterator[MatrixPlan]:
    norm = f"{path}.{a.mlp_norm}"
    name = f"{path}.{a.down}"
    # A single block leaves nothing to permute.
    permuted = recipe.permutation != "identity" and block < sizes.intermediate
    region = name if permuted else None
    inner = Side(permutation=region)
    # The gate passes through an activation function, so factors go through up alone.
    linear = Side(permutation=region, factors=None if recipe.factors == "none" else name)
    wide = (sizes.intermediate, sizes.hidden)
    for part, written in ((a.gate, inner), (a.up, linear)):
        yield MatrixPlan(f"{path}.{part}", wide, norm, stream.read, written, online=stream.online)
    yield MatrixPlan(
        name,
        (sizes.hidden, sizes.intermediate),
        input=Side(permutation=region, factors=linear.factors, rotation=block),
        output=stream.written,
        online=True,
    )


def _additions_per_channel(block_size: int) -> int:
    core, power = hadamard_factors(block_size)
    return power.bit_length() - 1 + (core if core > 1 else 0)


def _scaled(spec: QuantSpec, matrix: MatrixPlan) -> int:
    # How many entries share a scale; a whole tensor's single scale is not worth a special case.
    return spec.group_size or matrix.shape[1]


def _block_sizes(recipe: Recipe, sizes: Dimensions) -> list[int]:
    """Return each layer's block size; an automatic one counts as the full vector until chosen."""
    given = recipe.block_size
    wanted: tuple[int | None, ...]
    if isinstance(given, tuple):
        wanted = given
    else:
        wanted = (given if isinstance(given, int) else None,) * sizes.blocks
    if len(wanted) != sizes.blocks:
        raise RecipeError(
            f"block_size must be one number or one for each of {sizes.blocks} blocks, "
            f"got {len(wanted)}"
        )
    return [_rotation("block_size", b, "intermediate_size", sizes.intermediate) for b in wanted]


def _rotation(what: str, size: int | None, field: str, width: int) -> int:
    try:
        return check_block_size(what, size, width)
    except (BlockSizeError, HadamardOrderError) as error:
        raise type(error)(f"{field}={width} of the model: {error}") from None


def _check_groups(matrices: list[MatrixPlan], recipe: Recipe) -> None:
    for field, spec in (("weights", recipe.weights), ("activations", recipe.activations)):
        group = spec.group_size if spec is not None else None
        if group is None:
            continue
        for matrix in matrices:
            if matrix.quantized and matrix.shape[1] % group:
                raise BlockSizeError(
                    f"the group size of {field} must divide the inputs of every layer, got "
                    f"{group} for {matrix.name} with {matrix.shape[1]} inputs"
                )


def check_modules(plan: ModelPlan, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ArchitectureError unless every matrix and norm of the plan is in the model.

    Parameters
    ----------
    plan : ModelPlan
    shapes : dict
        Shape of every parameter of the model by its name.
    """
    for matrix in plan.matrices:
        found = shapes.get(f"{matrix.name}.weight")
        if found != matrix.shape:
            raise ArchitectureError(
                f"{matrix.name}.weight must have shape {matrix.shape} as "
                f"{plan.architecture.model_type!r} is described, got {found}"
            )
    for norm in plan.norms:
        if f"{norm}.weight" not in shapes:
            raise ArchitectureError(f"the model has no norm {norm!r} with a weight")

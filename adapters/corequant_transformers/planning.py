"""What will be done to each matrix of a model, decided from its config alone.

The plan is a table with one row for every matrix that changes. A row says which norm's gain is
folded in, how the channels that it reads and writes are permuted and rotated, whether its input is
rotated at run time, and whether it is quantized. Everything that follows only carries out rows, so
a matrix can be transformed by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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

__all__ = ["MatrixPlan", "ModelPlan", "Side", "check_modules", "plan_model"]

RESIDUAL = "residual"
"""Name of the residual stream's signs."""


@dataclass(frozen=True)
class Side:
    """What happens to the channels on one side of a matrix, in the order of the attributes.

    Attributes
    ----------
    permutation : str, optional
        Name of the region whose permutation applies; the name of the matrix that reads it.
    factors : str, optional
        Name of the signs or scales that the activation's channels are multiplied by.
    rotation : int, optional
        Block length of the rotation; None leaves the channels alone.
    """

    permutation: str | None = None
    factors: str | None = None
    rotation: int | None = None


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix and all that happens to it.

    Attributes
    ----------
    name : str
        Path of its module.
    shape : tuple of int
        (out_features, in_features); an embedding is (vocabulary, hidden), its tokens' vectors
        being rows, so that its ``input`` side is what it writes to the residual stream.
    norm : str, optional
        Path of the norm whose gain is folded in.
    input, output : Side
        What happens to its columns and to its rows.
    online : bool
        Whether the input is rotated at run time rather than by the layer before.
    quantized : bool
        Whether its weight and its input are quantized.
    """

    name: str
    shape: tuple[int, int]
    norm: str | None = None
    input: Side = Side()
    output: Side = Side()
    online: bool = False
    quantized: bool = True


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
        Paths of the norms whose gains become 1.
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
        """Return what the plan costs: run-time additions, sizes in MiB, block sizes that work.

        ``peak_mib`` is the estimated peak memory of ``quantize``: the model in float64 while it is
        verified, and what torch and a window's activations take.
        """
        additions = sum(
            m.shape[1] * _additions_per_channel(m.input.rotation or 1) for m in self.online
        )
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
            "online_share": additions / products,
            "quantized_mib": stored / 2**20,
            "float_mib": 4 * products / 2**20,
            "peak_mib": (8 * entries + 3 * 128 * 8 * self.dimensions.vocabulary) / 2**20 + 700,
            "block_sizes": list(valid_block_sizes(self.dimensions.intermediate)),
        }

    @property
    def regions(self) -> tuple[MatrixPlan, ...]:
        """The matrices whose inputs are permuted or multiplied by factors of their own."""
        return tuple(m for m in self.matrices if m.name in (m.input.permutation, m.input.factors))

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
    residual = Side(
        factors=RESIDUAL if recipe.random_signs else None,
        rotation=_rotation("residual rotation", None, "hidden_size", sizes.hidden),
    )
    head = Side(rotation=_rotation("head rotation", None, "head_dim", sizes.head_dim))
    matrices = [
        MatrixPlan(
            architecture.embedding,
            (sizes.vocabulary, sizes.hidden),
            input=residual,
            quantized=False,
        )
    ]
    norms = [architecture.final_norm]
    for i in range(sizes.blocks):
        path = architecture.block.format(i)
        matrices += _attention(architecture, sizes, path, residual, head)
        matrices += _mlp(architecture, sizes, path, residual, blocks[i], recipe)
        norms += [f"{path}.{architecture.attention_norm}", f"{path}.{architecture.mlp_norm}"]
    matrices.append(
        MatrixPlan(
            architecture.head,
            (sizes.vocabulary, sizes.hidden),
            norm=architecture.final_norm,
            input=residual,
            quantized=False,
        )
    )
    _check_groups(matrices, recipe)
    return ModelPlan(architecture, sizes, recipe, tuple(matrices), tuple(norms))


def _attention(
    a: Architecture, sizes: Dimensions, path: str, residual: Side, head: Side
) -> Iterator[MatrixPlan]:
    norm = f"{path}.{a.attention_norm}"
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield MatrixPlan(f"{path}.{a.query}", (queries, sizes.hidden), norm, residual)
    yield MatrixPlan(f"{path}.{a.key}", (keys, sizes.hidden), norm, residual)
    yield MatrixPlan(f"{path}.{a.value}", (keys, sizes.hidden), norm, residual, output=head)
    yield MatrixPlan(
        f"{path}.{a.attention_output}", (sizes.hidden, queries), input=head, output=residual
    )


def _mlp(
    a: Architecture,
    sizes: Dimensions,
    path: str,
    residual: Side,
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
    yield MatrixPlan(f"{path}.{a.gate}", wide, norm, residual, output=inner)
    yield MatrixPlan(f"{path}.{a.up}", wide, norm, residual, output=linear)
    yield MatrixPlan(
        name,
        (sizes.hidden, sizes.intermediate),
        input=Side(permutation=region, factors=linear.factors, rotation=block),
        output=residual,
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

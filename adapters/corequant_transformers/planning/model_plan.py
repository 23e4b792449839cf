"""What will be done to each matrix of a model, decided from its config alone.

The plan is a table with a row (``MatrixPlan``) for every matrix that changes. Everything that
follows carries out rows, so each matrix can be transformed alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.errors import BlockSizeError, RecipeError
from corequant.hadamard import hadamard_factors, valid_block_sizes
from corequant.recipe import Recipe
from corequant.rotation import random_signs
from corequant.specs import QuantSpec
from corequant_transformers.architectures.known import (
    Architecture,
    Dimensions,
    architecture_of,
    dimensions_of,
)
from corequant_transformers.planning.matrix_plan import (
    RESIDUAL,
    MatrixPlan,
    Region,
    RowSlice,
    Side,
    Stream,
    check_rotation,
    plan_stream,
    regions_of,
)

__all__ = ["VERIFIED_TOKENS", "ModelPlan", "plan_model"]

VERIFIED_TOKENS = 128
"""Tokens of the first window on which the transformed model is compared with the float one."""

_BASE = 600 * 2**20
"""What Python, torch, Transformers and compiled kernels take before any weight is read."""

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
    whole_bytes : int
        Bytes of the float32 model, where its file can't be read a part at a time.
    """

    architecture: Architecture
    dimensions: Dimensions
    recipe: Recipe
    matrices: tuple[MatrixPlan, ...]
    norms: tuple[str, ...]
    notes: tuple[str, ...] = ()
    whole_bytes: int = 0

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
        depth unless it is a GGUF file, which is decoded as a whole.
        """
        rotations = [(self.share(m), m) for m in self.online]
        additions = sum(
            share * m.shape[1] * _additions_per_channel(m.input.rotation or 1)
            for share, m in rotations
        )
        # Each rotated channel is read and written once, in float16 as models run.
        traffic = sum(share * 2 * 2 * m.shape[1] for share, m in rotations)
        products = sum(m.shape[0] * m.shape[1] for m in self.quantized)
        used = sum(self.share(m) * m.shape[0] * m.shape[1] for m in self.quantized)
        spec = self.recipe.weights
        stored = sum(
            m.shape[0] * (m.shape[1] * spec.format.bits / 8 + 4 * m.shape[1] / _scaled(spec, m))
            for m in self.quantized
        )
        return {
            "online_rotations": len(rotations),
            "online_additions_per_token": round(additions),
            "online_bytes_per_token": round(traffic),
            "online_share": additions / used,
            "quantized_mib": stored / 2**20,
            "float_mib": 4 * products / 2**20,
            "peak_mib": self.peak_bytes() / 2**20,
            "block_sizes": self._possible_block_sizes(),
        }

    def peak_bytes(self) -> int:
        """Return the estimated peak memory of quantizing a model on disk.

        Depth has no part in it where the model is read a part at a time.
        """
        recipe, sizes = self.recipe, self.dimensions
        blocks: dict[int, int] = {}
        edge = 0
        for matrix in self.matrices:
            count = matrix.shape[0] * matrix.shape[1]
            if matrix.block is None:
                edge = max(edge, count)
            else:
                blocks[matrix.block] = blocks.get(matrix.block, 0) + count
        block = max(blocks.values())
        logits = 4 * 8 * VERIFIED_TOKENS * sizes.vocabulary
        widest = max(m.shape[1] for m in self.quantized)
        # Activations of one window, and the second moments of one input.
        window = 4 * recipe.sequence_length * (6 * sizes.hidden + 4 * widest)
        moments = 8 * 3 * widest**2
        running = 4 * block + window + moments
        rounding = _BLOCK_BYTES * block
        if recipe.rounding_options().needs_moments:
            rounding += moments + window
        return _BASE + self.whole_bytes + max(running, rounding, _VOCABULARY_BYTES * edge + logits)

    def _possible_block_sizes(self) -> list[int]:
        rotated = self.online if self.recipe.rotation == "online" else self.mlp_outputs
        return list(valid_block_sizes(math.gcd(*(m.shape[1] for m in rotated))))

    def share(self, matrix: MatrixPlan) -> float:
        """Return the share of the tokens that a matrix sees."""
        sizes = self.dimensions
        return 1.0 if matrix.expert is None else min(1.0, sizes.experts_chosen / sizes.experts)

    @property
    def folds(self) -> bool:
        """Whether the norms' gains are folded into the weights."""
        return self.recipe.rotation != "online" and not self.architecture.post_norms

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
    RecipeError
        If signs or scales are asked for where the path isn't linear.
    TypeError
        If ``recipe`` is no Recipe.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}")
    architecture = architecture_of(config)
    sizes = dimensions_of(config)
    sparse = [_is_sparse(architecture, config, i) for i in range(sizes.blocks)]
    _check_factors(architecture, recipe, sparse)
    blocks = _block_sizes(
        recipe, [sizes.expert_intermediate if s else sizes.intermediate for s in sparse]
    )
    stream = plan_stream(architecture, recipe, sizes)
    matrices = list(_embeddings(architecture, sizes, stream))
    norms = [architecture.final_norm]
    for i in range(sizes.blocks):
        path = architecture.block.format(i)
        matrices += _attention(architecture, sizes, i, stream, recipe)
        matrices += _mlps(architecture, sizes, i, stream, sparse[i], blocks[i], recipe)
        norms += [f"{path}.{norm}" for norm in architecture.norms]
    matrices.append(
        MatrixPlan(
            architecture.head,
            (sizes.vocabulary, sizes.hidden),
            norm=architecture.final_norm,
            input=stream.final,
            quantized=False,
            reads="final",
            role="head",
        )
    )
    _check_groups(matrices, recipe)
    return ModelPlan(architecture, sizes, recipe, tuple(matrices), tuple(norms), stream.notes)


def _embeddings(a: Architecture, sizes: Dimensions, stream: Stream) -> Iterator[MatrixPlan]:
    for name, rows in ((a.embedding, sizes.vocabulary), (a.positions, sizes.positions)):
        if name is not None:
            shape = (rows, sizes.hidden)
            yield MatrixPlan(name, shape, input=stream.written, quantized=False, role="embedding")


def _attention(
    a: Architecture, sizes: Dimensions, block: int, stream: Stream, recipe: Recipe
) -> Iterator[MatrixPlan]:
    path = a.block.format(block)
    name = f"{path}.{a.attention_output}"
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    online = recipe.rotation == "online"
    if online:
        given = recipe.block_size if isinstance(recipe.block_size, int) else None
        width = check_rotation("block_size", given, "heads times head_dim", queries)
    else:
        width = check_rotation(
            "head_block_size", recipe.head_block_size, "head_dim", sizes.head_dim
        )
    # A block that holds whole heads leaves nothing to balance inside them.
    inside = width < sizes.head_dim and sizes.head_dim % width == 0
    region = name if inside and recipe.permutation != "identity" else None
    group = sizes.heads // sizes.kv_heads if region else 1
    heads = sizes.kv_heads if region else 1
    value = Side(permutation=region, rotation=None if online else width, heads=heads)
    projections = (
        (a.query, RowSlice(queries)),
        (a.key, RowSlice(keys)),
        (a.value, RowSlice(keys, value)),
    )
    yield from _readers(
        path, a.attention_norm, projections, sizes, stream, block=block, role="attention_input"
    )
    yield MatrixPlan(
        name,
        (sizes.hidden, queries),
        input=Side(permutation=region, rotation=width, heads=heads, repeat=group),
        output=stream.written,
        online=online,
        reads=name,
        block=block,
        role="attention_output",
    )


def _readers(
    path: str,
    norm: str | None,
    projections: Iterable[tuple[str, RowSlice]],
    sizes: Dimensions,
    stream: Stream,
    **where: Any,
) -> Iterator[MatrixPlan]:
    """Yield quantized readers of the stream; those with one path are slices of one matrix."""
    fused: dict[str, list[RowSlice]] = {}
    for name, rows in projections:
        fused.setdefault(name, []).append(rows)
    expert = where.get("expert")
    reads = f"{path}.{where['role']}" + ("" if expert is None else f".{expert}")
    for name, slices in fused.items():
        yield MatrixPlan(
            f"{path}.{name}",
            (sum(each.rows for each in slices), sizes.hidden),
            None if norm is None else f"{path}.{norm}",
            stream.read,
            output=slices[0].output if len(slices) == 1 else Side(),
            online=stream.online,
            slices=tuple(slices) if len(slices) > 1 else (),
            reads=reads,
            **where,
        )


def _mlps(
    a: Architecture,
    sizes: Dimensions,
    block: int,
    stream: Stream,
    sparse: bool,
    block_size: int,
    recipe: Recipe,
) -> Iterator[MatrixPlan]:
    path = a.block.format(block)
    e = a.experts
    if e is None or not sparse:
        layers = (a.gate, a.up, a.down)
        yield from _mlp(a, sizes, layers, sizes.intermediate, stream, block_size, recipe, block)
        return
    yield MatrixPlan(
        f"{path}.{e.router}",
        (sizes.experts, sizes.hidden),
        None if a.mlp_norm is None else f"{path}.{a.mlp_norm}",
        stream.final,
        quantized=False,
        reads=f"{path}.mlp_input",
        block=block,
        role="router",
    )
    for i in range(sizes.experts):
        layers = (f"{e.path}.{i}.{e.gate}", f"{e.path}.{i}.{e.up}", f"{e.path}.{i}.{e.down}")
        width = sizes.expert_intermediate
        yield from _mlp(a, sizes, layers, width, stream, block_size, recipe, block, i)


def _mlp(
    a: Architecture,
    sizes: Dimensions,
    layers: tuple[str | None, str, str],
    width: int,
    stream: Stream,
    block_size: int,
    recipe: Recipe,
    block: int,
    expert: int | None = None,
) -> Iterator[MatrixPlan]:
    path = a.block.format(block)
    gate, up, down = layers
    name = f"{path}.{down}"
    # A single block leaves nothing to permute.
    online = recipe.rotation != "offline"
    permuted = recipe.permutation != "identity" and block_size < width
    region = name if permuted and online else None
    inner = Side(permutation=region)
    # The gate passes through an activation function, so factors go through up alone.
    linear = replace(inner, factors=None if recipe.factors == "none" else name)
    projections = [(up, RowSlice(width, linear))]
    if gate is not None:
        projections.insert(0, (gate, RowSlice(width, inner)))
    where = {"block": block, "expert": expert}
    yield from _readers(path, a.mlp_norm, projections, sizes, stream, role="mlp_input", **where)
    yield MatrixPlan(
        name,
        (sizes.hidden, width),
        input=replace(linear, rotation=block_size if online else None),
        output=stream.written,
        online=online,
        reads=name,
        block=block,
        expert=expert,
        role="mlp_output",
    )


def _is_sparse(a: Architecture, config: Any, block: int) -> bool:
    if a.experts is None:
        return False
    return a.experts.is_sparse is None or a.experts.is_sparse(config, block)


def _check_factors(a: Architecture, recipe: Recipe, sparse: list[bool]) -> None:
    if recipe.factors != "none" and a.gate is None and not all(sparse):
        raise RecipeError(
            f"factors must be none for {a.model_type!r}, got {recipe.factors!r}: signs and scales "
            f"pass only through linear paths, and in an MLP without a gate the activation "
            f"function stands between {a.up} and {a.down}"
        )


def _additions_per_channel(block_size: int) -> int:
    core, power = hadamard_factors(block_size)
    return power.bit_length() - 1 + (core if core > 1 else 0)


def _scaled(spec: QuantSpec, matrix: MatrixPlan) -> int:
    # How many entries share a scale; a whole tensor's single scale is not worth a special case.
    return spec.group_size or matrix.shape[1]


def _block_sizes(recipe: Recipe, widths: list[int]) -> list[int]:
    """Return each layer's block size; an automatic one counts as the full vector until chosen."""
    given = recipe.block_size
    if recipe.rotation == "offline":
        return widths
    wanted: tuple[int | None, ...]
    if isinstance(given, tuple):
        wanted = given
    else:
        wanted = (given if isinstance(given, int) else None,) * len(widths)
    if len(wanted) != len(widths):
        raise RecipeError(
            f"block_size must be one number or one for each of {len(widths)} blocks, "
            f"got {len(wanted)}"
        )
    pairs = zip(wanted, widths, strict=True)
    return [check_rotation("block_size", b, "intermediate_size", width) for b, width in pairs]


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

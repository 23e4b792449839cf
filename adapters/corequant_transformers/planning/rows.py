"""The rows of a plan, in the order in which a token meets the matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from corequant.errors import RecipeError
from corequant.recipe import FLOAT, LayerSettings, Recipe
from corequant.specs import QuantSpec
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.dimensions import (
    Dimensions,
    dimensions_in,
    evaluate,
)
from corequant_transformers.architectures.where import holds
from corequant_transformers.planning.latent_rows import latent_rows
from corequant_transformers.planning.matrix_plan import (
    MatrixPlan,
    RowSlice,
    Side,
    Stream,
    check_rotation,
    inside,
    plan_stream,
    reader_rows,
)
from corequant_transformers.planning.mixer_rows import mixer_rows

__all__ = ["plan_matrices"]


def plan_matrices(
    a: Architecture, config: Any, sizes: Dimensions, recipe: Recipe
) -> tuple[tuple[MatrixPlan, ...], tuple[str, ...]]:
    """Return a row for every matrix of a model, and what its structure prevents.

    Parameters
    ----------
    a : Architecture
    config : transformers.PreTrainedConfig
    sizes : Dimensions
    recipe : Recipe

    Raises
    ------
    BlockSizeError, HadamardOrderError
        If a rotation doesn't fit a width; the message names the width.
    RecipeError
        If signs or scales are asked for where the path isn't linear.
    """
    blocks = [a.in_block(config, i) for i in range(sizes.blocks)]
    own = [dimensions_in(sizes, block, config, i) for i, block in enumerate(blocks)]
    sparse = [_is_sparse(block, config, i) for i, block in enumerate(blocks)]
    for block, is_sparse in zip(blocks, sparse, strict=True):
        _check_factors(block, recipe, is_sparse)
    pairs = zip(own, sparse, strict=True)
    widths = [(each.expert_intermediate if s else each.intermediate) or None for each, s in pairs]
    lengths = _block_sizes(recipe, widths)
    stream = plan_stream(a, recipe, sizes)
    matrices = list(_embeddings(a, sizes, stream, recipe))
    for i, block in enumerate(blocks):
        if block.mixers:
            matrices += mixer_rows(block, config, own[i], i, stream, recipe)
        if block.attention_output is not None:
            matrices += _attention(block, config, own[i], i, stream, recipe)
        matrices += _cross_attention(block, config, own[i], i, stream, recipe)
        matrices += _mlps(block, own[i], i, stream, sparse[i], lengths[i], recipe)
    if a.enclosed:
        return tuple(matrices), stream.notes
    head = MatrixPlan(
        a.head,
        (sizes.vocabulary, sizes.hidden),
        norm=a.final_norm,
        input=stream.final,
        settings=_vocabulary_settings(recipe, a.head, recipe.head),
        reads="final",
        role="head",
    )
    return (*matrices, head), stream.notes


def _vocabulary_settings(recipe: Recipe, path: str, spec: QuantSpec | None) -> LayerSettings:
    """Return how embedding or head is quantized, which rules for layers may keep in float."""
    kept = recipe.settings_of(path).weights is None
    return FLOAT if kept else LayerSettings(spec)


def _embeddings(
    a: Architecture, sizes: Dimensions, stream: Stream, recipe: Recipe
) -> Iterator[MatrixPlan]:
    if a.enclosed:
        _check_enclosed(a, recipe)
        return
    tables = (
        (
            a.embedding,
            sizes.vocabulary,
            _vocabulary_settings(recipe, a.embedding, recipe.embeddings),
        ),
        (a.positions, sizes.positions, FLOAT),
    )
    for name, rows, settings in tables:
        if name is not None:
            shape = (rows, sizes.hidden)
            written = stream.written
            norm = a.embedding_norm if name == a.embedding else None
            yield MatrixPlan(
                name,
                shape,
                norm,
                own_norm=norm is not None,
                input=written,
                settings=settings,
                role="embedding",
            )


def _check_enclosed(a: Architecture, recipe: Recipe) -> None:
    for name, spec in (("embeddings", recipe.embeddings), ("head", recipe.head)):
        if spec is not None:
            raise RecipeError(
                f"{name} must be None for {a.model_type!r}, of which only the blocks are "
                f"quantized, got {spec}"
            )


def _attention(
    a: Architecture, config: Any, sizes: Dimensions, block: int, stream: Stream, recipe: Recipe
) -> Iterator[MatrixPlan]:
    """Yield the rows of a decoder block's attention, in the order in which they run."""
    path, latent = a.block_path(block), a.latent
    if latent is not None:
        width = evaluate(latent.value, config, block)
        sizes = replace(sizes, kv_heads=sizes.heads, head_dim=width)
        value, output = _values(a, sizes, block, stream, recipe)
        yield from latent_rows(a, latent, config, sizes, block, stream, recipe, value)
        yield output
        return
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    gates = queries if a.query_gate else 0
    value, output = _values(a, sizes, block, stream, recipe)
    known = {
        "query": (a.query, RowSlice(queries + gates)),
        "key": (a.key, RowSlice(keys)),
        "value": (a.value, RowSlice(keys, value)),
    }
    projections = [
        (name, rows) for name, rows in (known[which] for which in a.qkv_order) if name is not None
    ]
    groups = evaluate(a.qkv_groups, config, block)
    yield from reader_rows(
        path, a.attention_norm, projections, recipe, sizes, stream, groups,
        block=block, role="attention_input",
    )  # fmt: skip
    yield output


def _cross_attention(
    a: Architecture, config: Any, sizes: Dimensions, block: int, stream: Stream, recipe: Recipe
) -> Iterator[MatrixPlan]:
    """Yield the rows of a block's attention to the output of another stack, if it has one.

    Keys and values don't read this stack's stream, so their inputs have names of their own.
    """
    second = a.second
    if second is None or block < second.first:
        return
    other = replace(
        a,
        query=second.query,
        key=second.key,
        value=second.value,
        attention_output=second.output,
        qkv_order=("query", "key", "value"),
    )
    path = a.block_path(block)
    reads = dict.fromkeys((f"{path}.{second.key}", f"{path}.{second.value}"), f"{path}.memory")
    for row in _attention(other, config, sizes, block, stream, recipe):
        own = row.name if row.role == "attention_input" else row.reads
        yield replace(row, reads=reads.get(row.name, own))


def _values(
    a: Architecture, sizes: Dimensions, block: int, stream: Stream, recipe: Recipe
) -> tuple[Side, MatrixPlan]:
    """Return what happens to the values' channels, and the row of the output projection."""
    path = a.block_path(block)
    name = f"{path}.{a.attention_output}"
    queries = sizes.heads * sizes.head_dim
    online = recipe.rotation == "online"
    linear = a.linear_values and (a.value is not None or a.latent is not None)
    width: int | None
    if online:
        given = recipe.block_size if isinstance(recipe.block_size, int) else None
        width = check_rotation("block_size", given, "heads times head_dim", queries)
    else:
        width = check_rotation(
            "head_block_size", recipe.head_block_size, "head_dim", sizes.head_dim
        )
    settings = recipe.settings_of(name)
    value = read = Side()
    if not linear and recipe.rotation in ("offline", "heads"):
        width = None
    if settings.weights is None or width is None:
        # Nothing is done for the sake of an input that stays as it is.
        online = False
    else:
        # A block that holds whole heads leaves nothing to balance inside them.
        within = width < sizes.head_dim and sizes.head_dim % width == 0
        moved = within and linear and settings.permutation != "identity"
        region = name if moved else None
        group = sizes.heads // sizes.kv_heads if region else 1
        heads = sizes.kv_heads if region else 1
        # What values are not linear in is rotated at run time alone.
        online = online or not linear
        value = Side(permutation=region, rotation=None if online else width, heads=heads)
        read = Side(permutation=region, rotation=width, heads=heads, repeat=group)
    output = MatrixPlan(
        name,
        (sizes.hidden, queries),
        inside(path, a.attention_inner_norm),
        own_norm=a.attention_inner_norm is not None,
        input=read,
        output=stream.written,
        online=online,
        settings=settings,
        reads=name,
        block=block,
        role="attention_output",
    )
    return value, output


def _mlps(
    a: Architecture,
    sizes: Dimensions,
    block: int,
    stream: Stream,
    sparse: bool,
    block_size: int | None,
    recipe: Recipe,
) -> Iterator[MatrixPlan]:
    e = a.experts
    if block_size is None:
        return
    if e is None or not sparse:
        if a.down is None:
            return
        layers = (a.gate, a.up, a.down)
        yield from _mlp(a, sizes, layers, sizes.intermediate, stream, block_size, recipe, block)
        return
    shared = list(_shared_expert(a, sizes, block, stream, block_size, recipe))
    if e.shared_first:
        yield from shared
    yield _router(a, e.router, sizes.experts, sizes, block, stream)
    for i in range(sizes.experts):
        layers = (f"{e.path}.{i}.{e.gate}", f"{e.path}.{i}.{e.up}", f"{e.path}.{i}.{e.down}")
        width = sizes.expert_intermediate
        yield from _mlp(a, sizes, layers, width, stream, block_size, recipe, block, i)
    if not e.shared_first:
        yield from shared


def _router(
    a: Architecture, name: str, rows: int, sizes: Dimensions, block: int, stream: Stream
) -> MatrixPlan:
    path = a.block_path(block)
    return MatrixPlan(
        f"{path}.{name}",
        (rows, sizes.hidden),
        inside(path, a.mlp_norm),
        input=stream.final,
        reads=f"{path}.mlp_input",
        block=block,
        role="router",
    )


def _shared_expert(
    a: Architecture,
    sizes: Dimensions,
    block: int,
    stream: Stream,
    block_size: int,
    recipe: Recipe,
) -> Iterator[MatrixPlan]:
    """Yield the shared MLP of routed experts."""
    e, width = a.experts, sizes.shared_intermediate
    if e is None or e.shared_up is None or e.shared_down is None:
        return
    if recipe.rotation in ("offline", "heads") or recipe.block_size is None:
        size = width
    elif isinstance(recipe.block_size, int):
        size = check_rotation("block_size", block_size, "width of the shared expert", width)
    else:
        # What was chosen for the experts, where that fits.
        size = block_size if width % block_size == 0 else width
    layers = (e.shared_gate, e.shared_up, e.shared_down)
    yield from _mlp(a, sizes, layers, width, stream, size, recipe, block)
    if e.shared_router is not None:
        yield _router(a, e.shared_router, 1, sizes, block, stream)


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
    path = a.block_path(block)
    gate, up, down = layers
    name = f"{path}.{down}"
    settings = recipe.settings_of(name)
    kept = settings.weights is None
    online = recipe.rotation in ("merged", "online") and not kept
    # A single block leaves nothing to permute.
    permuted = settings.permutation != "identity" and block_size < width
    region = name if permuted and online else None
    inner = Side(permutation=region)
    # The gate passes through an activation function, so factors go through up alone.
    linear = replace(inner, factors=None if kept or recipe.factors == "none" else name)
    projections = [(up, RowSlice(width, linear))]
    if gate is not None:
        projections.insert(0, (gate, RowSlice(width, inner)))
    where: dict[str, Any] = {"block": block, "expert": expert}
    yield from reader_rows(
        path, a.mlp_norm, projections, recipe, sizes, stream, role="mlp_input", **where
    )
    yield MatrixPlan(
        name,
        (sizes.hidden, width),
        inside(path, None if expert is not None else a.mlp_inner_norm),
        own_norm=expert is None and a.mlp_inner_norm is not None,
        input=replace(linear, rotation=block_size if online else None),
        output=stream.written,
        online=online,
        settings=settings,
        reads=name,
        block=block,
        expert=expert,
        role="mlp_output",
    )


def _is_sparse(a: Architecture, config: Any, block: int) -> bool:
    if a.experts is None:
        return False
    return holds(a.experts.where, config, block)


def _check_factors(a: Architecture, recipe: Recipe, sparse: bool) -> None:
    if recipe.factors == "none":
        return
    if sparse:
        if a.experts is not None and not a.experts.linear_up:
            raise RecipeError(
                f"factors must be none for {a.model_type!r}, got {recipe.factors!r}: signs and "
                f"scales pass only through linear paths, and {a.experts.down} of its experts reads "
                f"a function of {a.experts.up} that isn't linear"
            )
        return
    if a.down is None:
        return
    if a.gate is None:
        raise RecipeError(
            f"factors must be none for {a.model_type!r}, got {recipe.factors!r}: signs and scales "
            f"pass only through linear paths, and in an MLP without a gate the activation "
            f"function stands between {a.up} and {a.down}"
        )
    if a.mlp_inner_norm is not None and recipe.factors != "signs":
        raise RecipeError(
            f"factors must be none or signs for {a.model_type!r}, got {recipe.factors!r}: scales "
            f"don't pass through {a.mlp_inner_norm}, which stands before {a.down}"
        )


def _block_sizes(recipe: Recipe, widths: list[int | None]) -> list[int | None]:
    """Return each MLP's block size; an automatic one counts as the full vector until chosen."""
    given = recipe.block_size
    if recipe.rotation in ("offline", "heads"):
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
    return [
        width and check_rotation("block_size", b, "intermediate_size", width) for b, width in pairs
    ]

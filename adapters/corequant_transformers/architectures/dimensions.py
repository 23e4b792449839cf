"""Sizes of a model, read from its config with the names that its description gives them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.known import architecture_of, decoder_config

__all__ = ["MOST_BLOCKS", "Dimensions", "dimensions_in", "dimensions_of", "evaluate", "of_block"]

MOST_BLOCKS = 4096
"""Largest accepted number of decoder blocks; published models have some hundred at most."""

_MOST_WIDE = 2**24
_MOST_EXPERTS = 2**16
"""In all blocks together."""


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a model, read from its config.

    Attributes
    ----------
    blocks, hidden, intermediate, heads, kv_heads, head_dim, vocabulary : int
        Decoder blocks, residual width, MLP width, query heads, key and value heads, channels per
        head, tokens of the vocabulary.
    tied : bool
        Whether embedding and head share one matrix.
    positions : int
        Rows of the embedding of positions; 0 without one.
    experts, experts_chosen, expert_intermediate : int
        Experts in a sparse block, how many of them a token visits, their width; 0 without any.
    shared_intermediate : int
        Width of the shared MLP; 0 without one.
    """

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    positions: int = 0
    experts: int = 0
    experts_chosen: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0


def dimensions_of(config: Any, architecture: Architecture | None = None) -> Dimensions:
    """Read the sizes from a Transformers config.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    architecture : Architecture, optional
        Its description; by default that of its model type.

    Raises
    ------
    ArchitectureError
        If one is missing, not positive or contradicts another.
    """
    architecture = architecture_of(config) if architecture is None else architecture
    # What is tied outside of the blocks stays so by itself.
    tied = not architecture.enclosed and bool(getattr(config, "tie_word_embeddings", False))
    config = decoder_config(config)
    hidden = _positive(config, "hidden_size")
    blocks = _positive(config, "num_hidden_layers", most=MOST_BLOCKS)
    if architecture.second is not None:
        blocks += _positive(config, architecture.second.blocks, most=MOST_BLOCKS)
    experts = architecture.experts
    plain = Dimensions(
        blocks=blocks,
        hidden=hidden,
        intermediate=0,
        heads=0,
        kv_heads=0,
        head_dim=0,
        vocabulary=_positive(config, "vocab_size"),
        tied=tied,
        positions=(
            _positive(config, "max_position_embeddings") + architecture.extra_positions
            if architecture.positions is not None
            else 0
        ),
        experts=(_positive(config, experts.count, most=_MOST_EXPERTS // blocks) if experts else 0),
        experts_chosen=_positive(config, experts.chosen) if experts else 0,
        expert_intermediate=evaluate(experts.intermediate_size, config) if experts else 0,
        shared_intermediate=(
            evaluate(experts.shared_size, config) if experts and experts.shared_down else 0
        ),
    )
    return dimensions_in(plain, architecture, config)


def dimensions_in(
    sizes: Dimensions, architecture: Architecture, config: Any, block: int = 0
) -> Dimensions:
    """Return the sizes with those of a decoder block's attention and MLP.

    Parameters
    ----------
    sizes : Dimensions
    architecture : Architecture
        Description that holds in the block.
    config : transformers.PreTrainedConfig
    block : int

    Raises
    ------
    ArchitectureError
        As ``dimensions_of``.
    """
    a = architecture
    if a.attention_output is not None:
        heads = evaluate(a.heads, config, block)
        kv_heads = evaluate(a.kv_heads, config, block, heads)
        if heads % kv_heads:
            raise ArchitectureError(f"{a.kv_heads} must divide {a.heads}={heads}, got {kv_heads}")
        head_dim = evaluate(a.head_dim, config, block, sizes.hidden // heads)
        sizes = replace(sizes, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    width = 0
    if a.down is not None:
        usual = None if a.usual_expansion is None else a.usual_expansion * sizes.hidden
        width = evaluate(a.intermediate_size, config, block, usual)
    return replace(sizes, intermediate=width)


def evaluate(expression: str, config: Any, block: int = 0, default: int | None = None) -> int:
    """Evaluate an expression of a description.

    Parameters
    ----------
    expression : str
        A field of the config, a number, or several of them with ``+``, ``-``, ``*`` and ``//``.
        Index of the decoder block whose entry is taken of a field with one entry per block.
    config : transformers.PreTrainedConfig
    block : int
    default : int, optional
        Value of an expression that is a single field which the config lacks.

    Raises
    ------
    ArchitectureError
        If the expression is malformed, or its value or a field in it is not positive.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from corequant_transformers.architectures.dimensions import evaluate
    >>> evaluate("3 * hidden_size // heads", SimpleNamespace(hidden_size=64, heads=4))
    48
    """
    try:
        tree = ast.parse(expression, mode="eval").body
        if isinstance(tree, ast.Name):
            return _positive(config, tree.id, default, block=block)
        value = _value(tree, config, block)
    except (SyntaxError, ZeroDivisionError):
        raise _no_size(expression) from None
    if value < 1:
        raise ArchitectureError(f"{expression} of the config must be positive, got {value}")
    return value


def _value(tree: ast.expr, config: Any, block: int) -> int:
    if isinstance(tree, ast.Name):
        return _positive(config, tree.id, block=block)
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        left, right = _value(tree.left, config, block), _value(tree.right, config, block)
        return _OPERATORS[type(tree.op)](left, right)
    raise _no_size(ast.unparse(tree))


def _no_size(expression: str) -> ArchitectureError:
    return ArchitectureError(
        "a size must be an expression of config fields and integers with +, -, * and //, "
        f"got {expression!r}"
    )


_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def of_block(config: Any, block: int) -> Any:
    """Return the config of a block, where fields may differ between blocks."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    return config.per_layer_config[block]


def _positive(
    config: Any, name: str, default: int | None = None, most: int = _MOST_WIDE, block: int = 0
) -> int:
    value = getattr(of_block(config, block), name, None)
    if isinstance(value, list | tuple) and block < len(value):
        value = value[block]
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = repr(value)[:80]
        raise ArchitectureError(f"the config's {name} must be a positive integer, got {got}")
    if value > most:
        raise ArchitectureError(
            f"the config's {name} must be at most {most}, got {str(value)[:40]}"
        )
    return value

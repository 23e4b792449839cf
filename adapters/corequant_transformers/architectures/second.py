"""A second stack of blocks, such as a decoder behind an encoder."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SecondStack", "index_of", "path_of"]


@dataclass(frozen=True)
class SecondStack:
    """Blocks behind others, each with an attention more, which reads what the others gave.

    Attributes
    ----------
    block : str
        Path of block i, with ``{}`` for i.
    stem : str
        Path of what makes the input of the first block.
    norm : str
        Path of what stands between the last of the blocks before and those that read it.
    query, key, value, output : str
        The further attention; query reads the stream, key and value what the other blocks gave.
    blocks : str
        Field of the config with their number.
    states : str
        The argument of a block that holds what the other blocks gave.
    ids : str
        The argument of the model that holds the tokens that these blocks read.
    first : int
        Number of the blocks before; known once a config is.
    """

    block: str
    stem: str
    norm: str
    query: str
    key: str
    value: str
    output: str
    blocks: str
    states: str = "encoder_hidden_states"
    ids: str = "decoder_input_ids"
    first: int = 0


def path_of(index: int, block: str, second: SecondStack | None) -> str:
    """Return the path of a block, by those of the stacks' blocks with ``{}`` for the index."""
    if second is not None and index >= second.first:
        return second.block.format(index - second.first)
    return block.format(index)


def index_of(name: str, block: str, second: SecondStack | None) -> int | None:
    """Return the index of the block that a parameter or module belongs to, by its name.

    Examples
    --------
    >>> from corequant_transformers.architectures.second import index_of
    >>> index_of("model.layers.3.mlp.up_proj.weight", "model.layers.{}", None)
    3
    """
    stacks = [(block, 0)] if second is None else [(block, 0), (second.block, second.first)]
    for path, first in stacks:
        before, after = path.split("{}")
        if name.startswith(before):
            index, _, _ = name.removeprefix(before).removesuffix(after).partition(".")
            if index.isdigit():
                return first + int(index)
    return None

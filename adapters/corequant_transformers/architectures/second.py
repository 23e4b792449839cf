"""A second stack of blocks, such as the decoder after an encoder."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SecondStack"]


@dataclass(frozen=True)
class SecondStack:
    """Blocks with cross-attention to the output of the first stack.

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

"""Models around a decoder: a language model with a vision tower and a projector.

The decoder of such a model has a description of its own. Everything outside of it stays unchanged,
except for the last products before the residual stream, which are rotated like the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.writer import Writer

__all__ = ["Composite"]


@dataclass(frozen=True)
class Composite:
    """A model with other modules around its decoder, such as a vision tower.

    Attributes
    ----------
    model_type : str
        Model type in ``config.json``.
    outside : tuple of str
        Paths of the modules outside of the decoder. They are copied as they are.
    writers : tuple of Writer
        Parameters in them whose products are written to the decoder's residual stream.
    own : Architecture, optional
        The decoder, if it is of a type that no model alone is of.
    config : str
        Field of the config that is the decoder's config.
    trunk : str
        Path of the decoder without its head.
    head : str
        Path of the head.

    Examples
    --------
    >>> from corequant_transformers.architectures.composite import Composite
    >>> from corequant_transformers.architectures.description import Architecture
    >>> Composite("llava", outside=("model.vision_tower",)).around(Architecture("llama")).block
    'model.language_model.layers.{}'
    """

    model_type: str
    outside: tuple[str, ...]
    writers: tuple[Writer, ...] = ()
    own: Architecture | None = None
    config: str = "text_config"
    trunk: str = "model.language_model"
    head: str = "lm_head"

    def decoder(self, config: Any) -> Any:
        """Return the decoder's config in that of the whole model.

        Raises
        ------
        ArchitectureError
            If it has none.
        """
        found = getattr(config, self.config, None)
        if found is None:
            raise ArchitectureError(
                f"the config of a {self.model_type!r} model must have a {self.config}, got none"
            )
        return found

    def around(self, decoder: Architecture) -> Architecture:
        """Return a decoder's description with the places that its parts have in this model."""

        def moved(path: str) -> str:
            # Causal language models keep the decoder under a name of their own.
            return f"{self.trunk}.{path.partition('.')[2]}"

        return replace(
            decoder,
            model_type=self.model_type,
            embedding=moved(decoder.embedding),
            embedding_norm=None
            if decoder.embedding_norm is None
            else moved(decoder.embedding_norm),
            positions=None if decoder.positions is None else moved(decoder.positions),
            final_norm=moved(decoder.final_norm),
            block=moved(decoder.block),
            head=self.head,
            outside=self.outside,
            writers=self.writers,
            requires=(),
        )

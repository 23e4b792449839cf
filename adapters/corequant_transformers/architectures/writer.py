"""Parameters outside of a decoder whose products are written to its residual stream."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Writer"]


@dataclass(frozen=True)
class Writer:
    """A parameter whose product is added to the residual stream, such as a projector's.

    Attributes
    ----------
    weight : str
        Its name, with ``{}`` for any index; a bias is found by the weight's name.
    transposed : bool
        Whether it is stored (in_features, out_features).
    """

    weight: str
    transposed: bool = False

    def among(self, names: Iterable[str]) -> list[str]:
        """Return the parameters of a model that match; several if the name has an index.

        Examples
        --------
        >>> from corequant_transformers.architectures.writer import Writer
        >>> Writer("mergers.{}.out.weight").among(["mergers.0.out.weight", "norm.weight"])
        ['mergers.0.out.weight']
        """
        pattern = re.escape(self.weight).replace(re.escape("{}"), r"\d+")
        return [name for name in names if re.fullmatch(pattern, name)]

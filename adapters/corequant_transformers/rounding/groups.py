"""One global scale for layers that read the same input.

Kernels multiply by query, key and value, or by gate and up, as by one matrix, and take one global
scale for all of it: vLLM the largest of those that a file holds, so a file must hold the same for
each. It is the smallest that one of them needs by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import corequant as cq
from corequant.specs import Granularity
from corequant_transformers.planning.matrix_plan import MatrixPlan

__all__ = ["shared_global_scales"]


def shared_global_scales(
    rows: Iterable[MatrixPlan], weights: Mapping[str, npt.NDArray[Any]], spec: cq.QuantSpec
) -> dict[str, npt.NDArray[np.float32]]:
    """Return each layer's global scale by its name; nothing for specs without one.

    Parameters
    ----------
    rows : iterable of MatrixPlan
    weights : mapping of str to numpy.ndarray (out_features, in_features)
        By the rows' names.
    spec : QuantSpec

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant_transformers.planning.matrix_plan import MatrixPlan
    >>> from corequant_transformers.rounding.groups import shared_global_scales
    >>> rows = [MatrixPlan(name, (1, 16), reads="input") for name in ("query", "key")]
    >>> weights = {n: np.full((1, 16), v, np.float32) for n, v in (("query", 6.0), ("key", 3.0))}
    >>> shared_global_scales(rows, weights, cq.QuantSpec.parse("nvfp4"))["key"]
    array([448.], dtype=float32)
    """
    if spec.granularity is not Granularity.TENSOR_GROUP:
        return {}
    rows = list(rows)
    least: dict[str, npt.NDArray[np.float32]] = {}
    for row in rows:
        own, key = cq.choose_global_scale(weights[row.name], spec), row.reads or row.name
        least[key] = np.minimum(own, least.get(key, own))
    return {row.name: least[row.reads or row.name] for row in rows}

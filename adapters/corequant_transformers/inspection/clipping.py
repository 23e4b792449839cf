"""The share of numbers that lie beyond the ends of their quantizer's grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.quantization import QuantizedTensor, choose_global_scale, choose_qparams
from corequant.specs import Granularity, QuantSpec

__all__ = ["clipped", "clipped_tokens", "clipped_weights"]

Array = npt.NDArray[Any]


def clipped(
    x: Array, scales: Array, zero_points: Array | None, spec: QuantSpec, global_scale: Any = None
) -> float:
    """Return the share of numbers that are further than half a step beyond their grid's ends.

    No number inside a grid is rounded by more than half a step; that of an end is the last one.

    Parameters
    ----------
    x : numpy.ndarray (..., d)
    scales, zero_points : numpy.ndarray
        As those of a ``QuantizedTensor``.
    spec : QuantSpec
    global_scale : numpy.ndarray (1,), optional

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> from corequant_transformers.inspection.clipping import clipped
    >>> spec = cq.QuantSpec.parse("int4:channel:symmetric")
    >>> clipped(np.array([[7.0, 7.4, 7.6, -9.0]]), np.ones((1, 1)), None, spec)
    0.5
    """
    numbers = np.unique(spec.format.finite_values)
    low = numbers[0] - (numbers[1] - numbers[0]) / 2
    high = numbers[-1] + (numbers[-1] - numbers[-2]) / 2
    steps = np.asarray(scales, np.float64)
    if global_scale is not None:
        steps = steps / np.asarray(global_scale, np.float64)
    shift = 0.0 if zero_points is None else np.asarray(zero_points, np.float64)
    ends = np.stack([(low - shift) * steps, (high - shift) * steps])
    groups = ends.shape[-1]
    wide = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    first, last = ends.min(0)[..., None], ends.max(0)[..., None]
    # What lies on the border was scaled to it.
    slack = 1e-6 * (last - first)
    return float(((wide < first - slack) | (wide > last + slack)).mean())


def clipped_weights(W: Array, quantized: QuantizedTensor) -> float:
    """Return the share of a float weight that the grids of its codes clip.

    Parameters
    ----------
    W : numpy.ndarray (out_features, in_features)
    quantized : QuantizedTensor
    """
    q = quantized
    return clipped(W, q.scales, q.zero_points, q.spec, q.global_scale)


def clipped_tokens(x: Array, spec: QuantSpec) -> float:
    """Return the share of numbers that a quantizer of activations clips.

    Parameters
    ----------
    x : numpy.ndarray (tokens, d)
    spec : QuantSpec
    """
    shared = None
    if spec.granularity is Granularity.TENSOR_GROUP:
        shared = choose_global_scale(x, spec)
    scales, zero_points = choose_qparams(x, spec, global_scale=shared)
    return clipped(x, scales, zero_points, spec, shared)

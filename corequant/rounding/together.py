"""Rounding of weights that read the same input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import is_elsewhere
from corequant._validation import check_matrix
from corequant.errors import ShapeError
from corequant.quantization import QuantizedTensor, as_spec, dequantize, quantize
from corequant.rounding.fitting import fit_scales
from corequant.rounding.hessian import check_cross_moment, check_hessian
from corequant.rounding.magr import magr
from corequant.rounding.methods import RoundingOptions, rounding_methods
from corequant.rounding.nearest import round_to_nearest
from corequant.rounding.problem import (
    RoundedTensor,
    RoundingReport,
    losses_of,
    reconstruction_loss,
)
from corequant.specs import Granularity, QuantSpec

__all__ = ["round_together"]

Array = npt.NDArray[Any]


def round_together(
    weights: Mapping[str, Any],
    spec: QuantSpec | str,
    options: RoundingOptions,
    H: Any = None,
    G: Any = None,
    *,
    global_scale: Any = None,
    tokens: int | None = None,
) -> dict[str, RoundedTensor]:
    """Quantize the weights of layers that read the same input.

    Parameters
    ----------
    weights : mapping of str to array (out_features, in_features)
        By the layers' names: NumPy arrays or torch tensors; all other arrays are of their kind.
    spec : QuantSpec or str
        The quantizer; any, but scales are fitted to outputs only by channel or group in float32.
    options : RoundingOptions
    H, G : array (in_features, in_features), optional
        Moments of the inputs, as ``InputMoments`` collects them: H where
        ``options.needs_moments``, G where ``options.needs_float``.
    global_scale : array (1,), optional
        Global scale that all the weights share; by default each has its own.
    tokens : int, optional
        How many tokens H and G are the moments of, such as ``InputMoments.count``.

    Returns
    -------
    dict of str to RoundedTensor
        Each with its own ``report``; the losses are relative to the weights as they were given.

    Raises
    ------
    AccumulatorError, BlockSizeError, HessianError, NonFiniteError, ShapeError, SpecError, TypeError
        As the methods raise them, naming the layers.

    Notes
    -----
    Rows are independent given H, so arrays are rounded as one, sharing a factorization, unless
    their scales depend on all rows of a tensor; tensors are rounded one by one.

    Examples
    --------
    >>> import numpy as np
    >>> from corequant.rounding import RoundingOptions, round_together
    >>> W, H = np.array([[0.9, -1.5], [0.1, 0.3]]), np.array([[1.0, 0.8], [0.8, 1.0]])
    >>> found = round_together({"k": W[:1], "v": W[1:]}, "int3:channel", RoundingOptions("gptq"), H)
    >>> found["v"].codes
    array([[1, 3]], dtype=int8)
    """
    spec = as_spec(spec)
    if H is None and options.needs_moments:
        raise TypeError(f"H must be given for {options.method}, got None")
    if G is None and options.needs_float and not rounding_methods()[options.method].optional_cross:
        raise TypeError(f"G must be given for {options.method}, got None")
    if any(is_elsewhere(W) for W in weights.values()):
        return {
            name: _round_elsewhere(W, spec, options, H, G, global_scale, name, tokens)
            for name, W in weights.items()
        }
    for matrix in weights.values():
        check_matrix("weights", matrix)
    widths = {name: W.shape[1] for name, W in weights.items()}
    if len(set(widths.values())) > 1:
        raise ShapeError(f"weights must read the same input, got inputs of {widths}")
    alone = spec.granularity not in (Granularity.CHANNEL, Granularity.GROUP)
    width = next(iter(widths.values()), 0)
    everyone = ", ".join(weights)
    H = None if H is None else check_hessian(H, width, everyone)
    G = None if G is None or H is None else check_cross_moment(G, H, everyone)
    batches = [[name] for name in weights] if alone else [list(weights)]
    result = {}
    for names in batches:
        W = np.concatenate([weights[name] for name in names])
        nearest = quantize(W, spec, global_scale=global_scale)
        start = fit_scales(W, H, spec) if options.fit_scales else nearest
        rounded = _round(W, start, options, H, G, ", ".join(names), tokens)
        first = 0
        for name in names:
            part = slice(first, first + len(weights[name]))
            first = part.stop
            report = replace(rounded.report, name=name)
            if H is not None:
                pair = [dequantize(_rows(q, part)) for q in (rounded, nearest)]
                loss, plain = losses_of(W[part], pair, H, G)
                report = replace(report, loss=loss, nearest_loss=plain)
            result[name] = RoundedTensor.of(_rows(rounded, part), report)
    return result


def _round_elsewhere(
    W: Any,
    spec: QuantSpec,
    options: RoundingOptions,
    H: Any,
    G: Any,
    divisor: Any,
    name: str,
    tokens: int | None,
) -> RoundedTensor:
    """Round one weight by functions that know its array's backend."""
    nearest = round_to_nearest(W, spec, H=H, G=G, global_scale=divisor, name=name)
    start = fit_scales(W, H, spec) if options.fit_scales else nearest
    rounded = _round(W, start, options, H, G, name, tokens)
    if H is None:
        return rounded
    loss = reconstruction_loss(W, rounded, H, G)
    report = replace(rounded.report, loss=loss, nearest_loss=nearest.report.loss)
    return RoundedTensor.of(rounded, report)


def _round(
    W: Array,
    start: QuantizedTensor,
    options: RoundingOptions,
    H: Any,
    G: Any,
    name: str,
    tokens: int | None,
) -> RoundedTensor:
    spec, method = start.spec, rounding_methods()[options.method]
    if method.round is None:
        return RoundedTensor.of(start, RoundingReport(method.name, name))
    given: dict[str, Any] = {"name": name, "tokens": tokens, "global_scale": start.global_scale}
    if options.magr:
        W = magr(W, H, alpha=options.magr, group_size=spec.group_size, name=name)
    elif not options.refit:
        # The search for scales is done already.
        given |= {"scales": start.scales, "zero_points": start.zero_points}
    if options.needs_float:
        given["G"] = G
    values = {option: getattr(options, option) for option in method.options}
    given |= {option: value for option, value in values.items() if value is not None}
    return method.round(W=W, H=H, spec=spec, **given)


def _rows(q: QuantizedTensor, part: slice) -> QuantizedTensor:
    if part.stop - part.start == q.codes.shape[0]:
        return q
    return QuantizedTensor(
        np.ascontiguousarray(q.codes[part]),
        np.ascontiguousarray(q.scales[part]),
        None if q.zero_points is None else np.ascontiguousarray(q.zero_points[part]),
        q.spec,
        q.global_scale,
    )

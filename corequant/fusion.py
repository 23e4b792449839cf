"""Permute, rotate and quantize activations in one pass over memory.

The results are those of the separate steps, ``x[..., permutation]``, ``block_hadamard`` and
``quantize``, bit for bit; between them a row stays in the cache. Where no fused kernel fits (a
scale for the whole tensor, a search for the scale, rows that are not a whole number of vectors) the
separate steps run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import backend_for, check_out
from corequant._validation import check_array, check_divides, check_index, check_permutation
from corequant.errors import NonFiniteError
from corequant.protocols import Backend, ChannelPermuter
from corequant.quantization import QuantizedTensor, as_spec, fake_quantize, quantize
from corequant.rotation import check_block_size, check_signs
from corequant.specs import QuantSpec

__all__ = ["rotate_fake_quantize", "rotate_quantize"]


def rotate_quantize(
    x: Any,
    block_size: int | None,
    spec: QuantSpec | str,
    *,
    permutation: npt.NDArray[Any] | None = None,
    signs: npt.NDArray[Any] | None = None,
    out: Any = None,
    threads: int | None = None,
) -> QuantizedTensor:
    """Permute, sign, rotate and quantize ``x`` in one pass.

    Parameters
    ----------
    x : array (..., d)
        NumPy array or torch tensor, floating and finite.
    block_size : int or None
        Length b of a block, as for ``block_hadamard``; None for the whole axis.
    spec : QuantSpec or str
        The quantizer, such as ``"int4:token:asymmetric"``.
    permutation : numpy.ndarray (d,), optional
        Integers p: new channel k is ``x[..., p[k]]``.
    signs : numpy.ndarray (d,), optional
        ±1 for each channel after the permutation, multiplied before the rotation.
    out : array (..., d), int8 (uint8 for unsigned codes), optional
        Destination of the codes.
    threads : int, optional
        Maximum number of threads; the result doesn't depend on it.

    Returns
    -------
    QuantizedTensor
        What ``quantize`` gives for the permuted, signed and rotated ``x``, bit for bit.

    Raises
    ------
    NonFiniteError
        If ``x`` holds NaN or infinity, or is so large that its rotation does.
    BlockSizeError, HadamardOrderError, PermutationError, ShapeError, SpecError, TypeError
        For a size that doesn't divide d or has no Hadamard matrix, or another wrong argument.

    Notes
    -----
    Source: permute, rotate, quantize as in "Pushing the Limits of Block Rotations in Post-Training
    Quantization", arXiv 2601.22347, section 3.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> x = np.array([[4.0, 1, 0, 0, 1, 1, 1, 0]], np.float32)
    >>> q = cq.rotate_quantize(x, 4, "int4:token:symmetric")
    >>> bool((q.codes == cq.quantize(cq.block_hadamard(x, 4), "int4:token:symmetric").codes).all())
    True
    """
    backend, how, spec = _prepare(x, block_size, spec, permutation, signs, threads)
    check_out(x, out, spec.format.code_dtype)
    fused = backend.rotate_quantize(x, spec=spec, out=out, **how)
    if fused is not None:
        codes, scales, zeros, *divisor = fused
        return QuantizedTensor(codes, scales, zeros, spec, *divisor)
    quantized: QuantizedTensor = _in_steps(backend, x, quantize, spec, **how)
    if out is None:
        return quantized
    out[...] = quantized.codes
    return replace(quantized, codes=out)


def rotate_fake_quantize(
    x: Any,
    block_size: int | None,
    spec: QuantSpec | str,
    *,
    permutation: npt.NDArray[Any] | None = None,
    signs: npt.NDArray[Any] | None = None,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Permute, sign, rotate ``x`` and round it to the grid that it chooses for itself.

    Parameters
    ----------
    x, block_size, spec, permutation, signs, threads
        As for ``rotate_quantize``.
    out : array (..., d), optional
        Destination, of x's dtype; may be ``x`` itself.

    Returns
    -------
    array (..., d)
        ``dequantize(rotate_quantize(...))`` in x's dtype. A tensor's gradient is the rotation's,
        straight through the rounding.

    Raises
    ------
    BlockSizeError, HadamardOrderError, NonFiniteError, PermutationError, ShapeError, TypeError
        As for ``rotate_quantize``.

    Notes
    -----
    Source: arXiv 2601.22347, section 3.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> x = np.array([[1, 2, 3, 4]], np.float32)
    >>> cq.rotate_fake_quantize(x, None, "int4:token:symmetric")
    array([[ 4.666667 , -1.3333334, -2.       ,  0.       ]], dtype=float32)
    """
    backend, how, spec = _prepare(x, block_size, spec, permutation, signs, threads)
    check_out(x, out)
    fused = backend.rotate_fake_quantize(x, spec=spec, out=out, **how)
    if fused is not None:
        return fused
    values = _in_steps(backend, x, fake_quantize, spec, **how)
    if out is None:
        return values
    out[...] = values
    return out


def _in_steps(
    backend: Backend,
    x: Any,
    function: Callable[[Any, QuantSpec], Any],
    spec: QuantSpec,
    block_size: int,
    permutation: npt.NDArray[np.int64] | None,
    signs: npt.NDArray[np.int8] | None,
    threads: int | None,
) -> Any:
    """Permute and rotate ``x``, then call ``function``, which refuses what isn't finite."""
    chosen = x if permutation is None else _permuted(backend, x, permutation)
    y = backend.block_hadamard(
        chosen, block_size, axis=x.ndim - 1, inverse=False, signs=signs, out=None, threads=threads
    )
    try:
        return function(y, spec)
    except NonFiniteError as error:
        # Looked for only now: on a device each look is a wait. No rotation makes it finite again.
        bad = backend.first_nonfinite(x)
        if bad is not None:
            raise NonFiniteError("x", *bad) from None
        raise NonFiniteError("the rotated x", error.count, error.index, error.value) from None


def _permuted(backend: Backend, x: Any, permutation: npt.NDArray[np.int64]) -> Any:
    if isinstance(backend, ChannelPermuter):
        return backend.permute_channels(x, permutation)
    return x[..., permutation]


def _prepare(
    x: Any,
    block_size: int | None,
    spec: QuantSpec | str,
    permutation: Any,
    signs: Any,
    threads: int | None,
) -> tuple[Backend, dict[str, Any], QuantSpec]:
    spec = as_spec(spec)
    backend = backend_for(x=x)
    check_array("x", x)
    d = int(x.shape[-1])
    if spec.group_size is not None:
        check_divides("group_size", spec.group_size, d)
    how = {
        "block_size": check_block_size("block_size", block_size, d),
        "permutation": permutation
        if permutation is None
        else check_permutation("permutation", permutation, d),
        "signs": check_signs("signs", signs, d),
        "threads": threads if threads is None else check_index("threads", threads),
    }
    return backend, how, spec

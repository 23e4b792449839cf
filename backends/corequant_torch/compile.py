"""Substitutes for corequant's public functions under ``torch.compile``: the operators.

The functions dispatch and validate in ways that Dynamo can't trace; the operators validate when
they run, and their fake implementations when they are traced.
"""

from __future__ import annotations

from typing import Any

import torch

from corequant import fusion, quantization, rotation
from corequant.quantization import QuantizedTensor
from corequant.specs import QuantSpec

__all__ = ["register"]


def _table(values: Any) -> Any:
    return None if values is None else torch.as_tensor(values)


def register() -> None:
    """Register the substitutes with Dynamo."""
    parse = torch.compiler.assume_constant_result(_parse)  # type: ignore[no-untyped-call]
    substitute = torch.compiler.substitute_in_graph

    @substitute(rotation.block_hadamard, skip_signature_check=True)
    def block_hadamard(
        x: Any,
        block_size: Any = None,
        *,
        axis: int = -1,
        inverse: bool = False,
        signs: Any = None,
        out: Any = None,
        threads: Any = None,
    ) -> Any:
        place = axis if axis >= 0 else x.ndim + axis
        size = x.shape[place] if block_size is None else block_size
        y = torch.ops.corequant.block_hadamard(x, size, place, inverse, _table(signs))
        return y if out is None else out.copy_(y)

    @substitute(quantization.fake_quantize, skip_signature_check=True)
    def fake_quantize(
        x: Any, spec: Any, *, global_scale: Any = None, out: Any = None, nonfinite: str = "raise"
    ) -> Any:
        propagate = nonfinite == "propagate"
        y = torch.ops.corequant.fake_quantize(x, _text(spec), global_scale, propagate)
        return y if out is None else out.copy_(y)

    @substitute(fusion.rotate_fake_quantize, skip_signature_check=True)
    def rotate_fake_quantize(
        x: Any,
        block_size: Any,
        spec: Any,
        *,
        permutation: Any = None,
        signs: Any = None,
        out: Any = None,
        threads: Any = None,
    ) -> Any:
        size = x.shape[-1] if block_size is None else block_size
        y = torch.ops.corequant.rotate_fake_quantize(
            x, size, _text(spec), _table(permutation), _table(signs)
        )
        return y if out is None else out.copy_(y)

    @substitute(fusion.rotate_quantize, skip_signature_check=True)
    def rotate_quantize(
        x: Any,
        block_size: Any,
        spec: Any,
        *,
        permutation: Any = None,
        signs: Any = None,
        out: Any = None,
        threads: Any = None,
    ) -> Any:
        if out is not None:
            raise NotImplementedError("out must be None under torch.compile, got a tensor")
        size = x.shape[-1] if block_size is None else block_size
        codes, scales, zeros, divisor = torch.ops.corequant.rotate_quantize(
            x, size, _text(spec), _table(permutation), _table(signs)
        )
        return QuantizedTensor(
            codes,
            scales,
            zeros if zeros.numel() else None,
            parse(spec) if isinstance(spec, str) else spec,
            divisor if divisor.numel() else None,
        )


def _text(spec: Any) -> str:
    # Dynamo traces this; torch 2.11 rejects a spec as an argument of a constant function.
    return spec if isinstance(spec, str) else str(spec)


def _parse(text: str) -> QuantSpec:
    return QuantSpec.parse(text)

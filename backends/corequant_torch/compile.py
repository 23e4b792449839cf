"""What ``torch.compile`` sees in place of corequant's public functions: the operators.

The functions themselves look for backends and check arguments in ways that Dynamo can't follow;
the operators check when they run, and their fake forms when they are traced.
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
    """Tell Dynamo; once is enough."""
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
            raise NotImplementedError("out is not supported under torch.compile")
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
    # Dynamo follows this; torch 2.11 takes no spec as an argument of a constant function.
    return spec if isinstance(spec, str) else str(spec)


def _parse(text: str) -> QuantSpec:
    return QuantSpec.parse(text)

"""The torch backend: dispatches tensors to the kernels of their device, or to an operator.

Under autograd, ``torch.compile`` or a transform of ``torch.func`` a call becomes one operator of
``corequant_torch.operators``; otherwise the kernels run immediately.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import BackendError
from corequant.formats import NumberFormat
from corequant.protocols import Moments, Quantized
from corequant.quantization import QuantizedTensor
from corequant.specs import QuantSpec
from corequant_torch import compile, operators
from corequant_torch.device.tables import device_table
from corequant_torch.gpu.runtime import has_triton
from corequant_torch.kernels.cpu import to_numpy, to_torch
from corequant_torch.kernels.engines import check_apart, check_devices, engine_for, is_plain_call

__all__ = ["TorchBackend"]

Tensor = torch.Tensor
Signs = npt.NDArray[np.int8] | None
Permutation = npt.NDArray[np.int64] | None

compile.register()


class TorchBackend:
    """Kernels on torch tensors of any device and stride; results stay on the tensors' device.

    ``block_hadamard``, ``fake_quantize`` and ``rotate_fake_quantize`` are differentiable, the last
    two by the straight-through estimator; codes, scales and statistics are not.
    """

    name = "torch"

    def check_together(self, **tensors: Tensor | None) -> None:
        """Raise BackendError unless all the named tensors are on one device."""
        first, x = next((n, t) for n, t in tensors.items() if t is not None)
        check_devices(x, first, **tensors)

    def from_numpy(self, array: npt.NDArray[Any], device: str = "cpu") -> Tensor:
        """Return a copy of an array as a tensor on ``device``; BackendError without that device."""
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("device 'cuda' must be available, got no usable GPU or driver")
        return to_torch(np.array(array)).to(device)

    def to_numpy(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Return a tensor as an array, copied from its device."""
        return to_numpy(tensor.detach().cpu())

    def describe(self) -> dict[str, str]:
        """Return the versions of torch and Triton, and the available devices."""
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        devices = ", ".join(["cpu", *gpus])
        triton = import_module("triton").__version__ if has_triton() else "absent"
        return {"torch": torch.__version__, "devices": devices, "triton": triton}

    def first_nonfinite(self, x: Tensor) -> tuple[int, tuple[int, ...], float] | None:
        """Return the count of NaN and Inf in ``x``, the first index and its value, or None."""
        return engine_for(x).first_nonfinite(x.detach())

    def block_hadamard(
        self,
        x: Tensor,
        block_size: int,
        *,
        axis: int,
        inverse: bool,
        signs: Signs,
        out: Tensor | None,
        threads: int | None,
    ) -> Tensor:
        """Rotate blocks of one axis; see ``corequant.block_hadamard``."""
        if out is not None:
            check_out(x, out)
        if is_plain_call(x):
            return engine_for(x).block_hadamard(
                x, block_size, axis=axis, inverse=inverse, signs=signs, out=out, threads=threads
            )
        y = operators.block_hadamard(x, block_size, axis, inverse, _tensor(signs))
        return y if out is None else out.copy_(y)

    def permute_channels(self, x: Tensor, permutation: npt.NDArray[np.int64]) -> Tensor:
        """Return ``x[..., permutation]``; the indices are cached on the device."""
        chosen: Tensor = x[..., device_table(permutation, x)]
        return chosen

    def rotate_quantize(
        self,
        x: Tensor,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: Permutation,
        signs: Signs,
        out: Tensor | None,
        threads: int | None,
    ) -> Quantized | None:
        """Return codes, scales, zero points and a global scale; None without a fused kernel."""
        check_devices(x, "x", out=out)
        if out is not None:
            check_apart(x, out)
        return engine_for(x).rotate_quantize(
            x, block_size, spec, permutation=permutation, signs=signs, out=out, threads=threads
        )

    def rotate_fake_quantize(
        self,
        x: Tensor,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: Permutation,
        signs: Signs,
        out: Tensor | None,
        threads: int | None,
    ) -> Tensor | None:
        """Return the dequantized codes; None without a fused kernel."""
        if out is not None:
            check_out(x, out)
        if is_plain_call(x):
            return engine_for(x).rotate_fake_quantize(
                x, block_size, spec, permutation=permutation, signs=signs, out=out, threads=threads
            )
        y = operators.rotate_fake_quantize(
            x, block_size, str(spec), _tensor(permutation), _tensor(signs)
        )
        return y if out is None else out.copy_(y)

    def token_normalize(self, x: Tensor) -> Tensor:
        """Return rows scaled to mean square 1; zero rows are unchanged."""
        return engine_for(x).token_normalize(x.detach())

    def moments(self, x: Tensor) -> Moments:
        """Return float64 sums of |x| and x² and the largest |x| of each channel (d,)."""
        return engine_for(x).moments(x.detach())

    def add_gram(
        self, total: Any, x: Tensor, other: Tensor | None = None, *, double: bool = False
    ) -> Any:
        """Return ``total`` + XᵀY (d, d) of token rows; on a device the sum stays there."""
        check_devices(x, "x", other=other)
        second = None if other is None else other.detach()
        return engine_for(x).add_gram(total, x.detach(), second, double=double)

    def encode(self, x: Tensor, form: NumberFormat) -> Tensor:
        """Return the codes nearest to a finite ``x``, unscaled."""
        return engine_for(x).encode(x.detach(), form)

    def decode(self, codes: Tensor, form: NumberFormat) -> Tensor:
        """Return the values of codes, unscaled, float32."""
        return engine_for(codes).decode(codes, form)

    def choose_global_scale(self, x: Tensor, spec: QuantSpec) -> Tensor:
        """Return the global scale, by which all scales are divided, float32 (1,)."""
        return engine_for(x).choose_global_scale(x.detach(), spec)

    def choose_qparams(
        self, x: Tensor, spec: QuantSpec, global_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return scales and zero points in the shape of ``spec``."""
        check_devices(x, "x", global_scale=global_scale)
        return engine_for(x).choose_qparams(x.detach(), spec, global_scale)

    def quantize(
        self,
        x: Tensor,
        spec: QuantSpec,
        scales: Tensor | None = None,
        zero_points: Tensor | None = None,
        global_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the codes of ``x``, scales and zero points."""
        check_devices(x, "x", scales=scales, zero_points=zero_points, global_scale=global_scale)
        return engine_for(x).quantize(x.detach(), spec, scales, zero_points, global_scale)

    def dequantize(
        self,
        codes: Tensor,
        spec: QuantSpec,
        scales: Tensor,
        zero_points: Tensor | None = None,
        global_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the values of codes, in the dtype of the scales."""
        check_devices(
            codes, "codes", scales=scales, zero_points=zero_points, global_scale=global_scale
        )
        return engine_for(codes).dequantize(codes, spec, scales, zero_points, global_scale)

    def fake_quantize(
        self,
        x: Tensor,
        spec: QuantSpec,
        global_scale: Tensor | None = None,
        *,
        out: Tensor | None = None,
        propagate: bool = False,
    ) -> Tensor:
        """Return ``x`` quantized and dequantized with scales chosen from it, in its dtype."""
        check_devices(x, "x", global_scale=global_scale)
        if out is not None:
            check_out(x, out)
        if is_plain_call(x):
            return engine_for(x).fake_quantize(x, spec, global_scale, out=out, propagate=propagate)
        y = operators.fake_quantize(x, str(spec), global_scale, propagate)
        return y if out is None else out.copy_(y)

    def round_columns(self, method: str, **arguments: Any) -> Any:
        """Round a weight on its device; see ``corequant.protocols.ColumnSolver``.

        CPU tensors go to NumPy's solvers on the same memory. On other devices blocks of columns
        are rounded by a Triton kernel where Triton is installed.
        """
        W = arguments["W"]
        others = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and n != "W"}
        q = arguments.get("quantized")
        if isinstance(q, QuantizedTensor):
            others |= {"codes": q.codes, "scales": q.scales}
        check_devices(W, "W", **others)
        return engine_for(W).round_columns(method, **arguments)


def check_out(x: Tensor, out: Tensor) -> None:
    """Raise unless the result for ``x`` can be written to ``out``."""
    check_devices(x, "x", out=out)
    check_apart(x, out)
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            "out must be None while gradients are recorded, got a tensor; use torch.no_grad()"
        )


def _tensor(table: npt.NDArray[Any] | None) -> Tensor | None:
    return None if table is None else torch.from_numpy(table)

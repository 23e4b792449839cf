"""Protocols of a backend: the few kernels from which everything else is composed."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from corequant.formats import NumberFormat
from corequant.specs import QuantSpec

__all__ = [
    "Array",
    "Backend",
    "ChannelPermuter",
    "ColumnSolver",
    "DeviceChecker",
    "Moments",
    "Quantized",
    "RegisteredBackend",
]

Array = Any
"""An array of the backend's own type: numpy.ndarray, torch.Tensor, ..."""

Moments = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Sums of |x| and of x² and the largest |x| of each channel, float64, shape (d,)."""

Quantized = tuple[Array, Array, Array | None] | tuple[Array, Array, Array | None, Array | None]
"""Codes, scales and zero points, and the global scale of a spec that has one."""


@runtime_checkable
class Backend(Protocol):
    """Kernels on one kind of array.

    The public functions check their arguments once and call these; a kernel trusts what it gets.
    Arrays are of the backend's own type and any stride. Results live where the input lives.
    ``signs`` is a NumPy array of ±1 (d,); scales and zero points are the backend's arrays.
    """

    name: str

    def describe(self) -> dict[str, str]:
        """Return versions and devices, for people to read."""

    def first_nonfinite(self, x: Array) -> tuple[int, tuple[int, ...], float] | None:
        """Return count, first index and value of NaN and Inf in ``x``, or None without any."""

    def block_hadamard(
        self,
        x: Array,
        block_size: int,
        *,
        axis: int,
        inverse: bool,
        signs: npt.NDArray[np.int8] | None,
        out: Array | None,
        threads: int | None,
    ) -> Array:
        """Rotate blocks of one axis by H/√b, ``out`` being x's equal in shape and dtype."""

    def rotate_quantize(
        self,
        x: Array,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: npt.NDArray[np.int64] | None,
        signs: npt.NDArray[np.int8] | None,
        out: Array | None,
        threads: int | None,
    ) -> Quantized | None:
        """Return codes of the permuted and rotated ``x``, scales and zero points, in one pass.

        A spec with a global scale has that too. None where there is no kernel for that, or
        something is not finite: the caller then takes separate steps.
        """

    def rotate_fake_quantize(
        self,
        x: Array,
        block_size: int,
        spec: QuantSpec,
        *,
        permutation: npt.NDArray[np.int64] | None,
        signs: npt.NDArray[np.int8] | None,
        out: Array | None,
        threads: int | None,
    ) -> Array | None:
        """Return what the codes of ``rotate_quantize`` stand for, in x's dtype, or None alike."""

    def token_normalize(self, x: Array) -> Array:
        """Return the rows of ``x`` (..., d) as (tokens, d), each scaled to mean square 1."""

    def moments(self, x: Array) -> Moments:
        """Return channel sums over all leading axes of ``x`` (..., d)."""

    def add_gram(
        self, total: Any, x: Array, other: Array | None = None, *, double: bool = False
    ) -> Any:
        """Return ``total`` + XᵀY of the rows of ``x`` and ``other`` (..., d), or of ``x`` alone.

        Products are in float32, or float64 for float64 input and where ``double``; the sum has the
        dtype of ``total``, which may be overwritten: a NumPy array, None for nothing yet, or what
        an earlier call returned. That may be NumPy's or stay where ``x`` is.
        """

    def encode(self, x: Array, form: NumberFormat) -> Array:
        """Return the codes nearest to ``x``, which is finite, without any scale."""

    def decode(self, codes: Array, form: NumberFormat) -> Array:
        """Return what codes stand for, float32."""

    def choose_global_scale(self, x: Array, spec: QuantSpec) -> Array:
        """Return the divisor of all scales of a tensor, float32 (1,)."""

    def choose_qparams(
        self, x: Array, spec: QuantSpec, global_scale: Array | None = None
    ) -> tuple[Array, Array | None]:
        """Return scales and zero points (None when symmetric), shaped as ``spec`` asks.

        Like the next ones it raises NonFiniteError where ``x`` isn't finite: it looks at every
        entry anyway.
        """

    def quantize(
        self,
        x: Array,
        spec: QuantSpec,
        scales: Array | None = None,
        zero_points: Array | None = None,
        global_scale: Array | None = None,
    ) -> tuple[Array, Array, Array | None]:
        """Return codes of ``x`` (in the format's ``code_dtype``), scales and zero points."""

    def dequantize(
        self,
        codes: Array,
        spec: QuantSpec,
        scales: Array,
        zero_points: Array | None = None,
        global_scale: Array | None = None,
    ) -> Array:
        """Return what codes stand for, in the dtype of the scales."""

    def fake_quantize(
        self,
        x: Array,
        spec: QuantSpec,
        global_scale: Array | None = None,
        *,
        out: Array | None = None,
        propagate: bool = False,
    ) -> Array:
        """Return ``x`` rounded to the grid that it chooses for itself, in x's dtype.

        With ``propagate``, entries that aren't finite stay as they are and choose no scale.
        """


@runtime_checkable
class RegisteredBackend(Backend, Protocol):
    """A backend that an entry point provides: kernels, and conversions from and to NumPy."""

    def from_numpy(self, array: npt.NDArray[Any]) -> Array:
        """Return a NumPy array as one of the backend's, in host memory."""

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return an array as NumPy's, copied from its device if it is on one."""


@runtime_checkable
class DeviceChecker(Protocol):
    """Optional part of a backend whose arrays live on several devices."""

    def check_together(self, **arrays: Array | None) -> None:
        """Raise BackendError unless all named arrays are on one device."""


@runtime_checkable
class ChannelPermuter(Protocol):
    """Optional part of a backend that keeps permutations where its arrays live."""

    def permute_channels(self, x: Array, permutation: npt.NDArray[np.int64]) -> Array:
        """Return ``x[..., permutation]``."""


@runtime_checkable
class ColumnSolver(Protocol):
    """Optional part of a backend: adaptive rounding where its arrays live."""

    def round_columns(self, method: str, **arguments: Any) -> Any:
        """Return what a public function gives for the backend's arrays.

        ``method`` is ``gptq``, ``gpfq``, ``qronos``, ``learned_rounding``, ``magr``,
        ``fit_scales``, ``round_to_nearest`` or ``reconstruction_loss``, and ``arguments`` are all
        of that function's, by name and not yet checked. Reconstruction losses are NumPy's up to
        rounding; codes need not be.
        """

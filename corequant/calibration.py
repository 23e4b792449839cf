"""Streaming, mergeable statistics of activations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._dispatch import backend_for
from corequant._validation import check_array, check_index
from corequant.errors import CalibrationError, NonFiniteError, ShapeError
from corequant.protocols import Backend

__all__ = ["ActivationStats"]

Vector = npt.NDArray[np.float64]

_PARTS = ("state", "inc")
"""Numbers of 128 bits that PCG64 is made of."""
_WORD = 2**64 - 1


class ActivationStats:
    """Sums over the tokens of an activation, from which means of every kind follow.

    Tokens are rows: ``update`` takes arrays (..., d). Sums and counts are kept rather than means,
    so two objects that saw different tokens merge to what one object would have seen.

    Parameters
    ----------
    d : int
        Number of channels.
    gram : bool
        Also collect XᵀX (d, d), for adaptive rounding.
    energy_gram : bool
        Also collect EᵀE (d, d) of the channel energies ``e = d·x²/‖x‖²`` of each token, which says
        which channels are large in the same token, for ``energydiff``.
    energy_stride : int
        Step between the tokens taken for that; it costs about d operations for each entry of a
        token, and some thousand tokens are enough.
    reservoir : int
        Size of a uniform random sample of tokens, for searches that need tokens; 0 keeps none.
    seed : int
        Seed of that sample. Objects to be merged must have different seeds.
    token_normalize : bool
        Scale each token to mean square 1 before anything else, so that the few tokens with massive
        activations don't decide alone. All-zero tokens stay zero.
    dtype : numpy dtype
        Data type of the Gram matrices, float32 or float64. Means are always float64.

    Raises
    ------
    TypeError, ValueError
        If ``d`` is not a positive integer or ``dtype`` another one.

    Notes
    -----
    ``H = XᵀX / n`` as in GPTQ (arXiv 2210.17323, section 3), without its factor 2. Grouping the
    tokens in other batches changes results only by rounding.

    Examples
    --------
    >>> import numpy as np, corequant as cq
    >>> stats = cq.ActivationStats(2).update(np.array([[1.0, -3.0], [3.0, 1.0]]))
    >>> stats.count, stats.mean_abs, stats.absmax
    (2, array([2., 2.]), array([3., 3.]))
    """

    def __init__(
        self,
        d: int,
        *,
        gram: bool = False,
        energy_gram: bool = False,
        energy_stride: int = 1,
        reservoir: int = 0,
        seed: int = 0,
        token_normalize: bool = False,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self.d = check_index("d", d)
        self.token_normalize = bool(token_normalize)
        self._dtype = np.dtype(dtype)
        if self._dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype must be float32 or float64, got {self._dtype}")
        self._count = 0
        self._sum_abs = np.zeros(d)
        self._sum_square = np.zeros(d)
        self._absmax = np.zeros(d)
        # What tensors on a device sum up stays there until it is read.
        self._gram: Any = np.zeros((d, d), self._dtype) if gram else None
        self._energy_gram: Any = np.zeros((d, d), self._dtype) if energy_gram else None
        self._energy_stride = check_index("energy_stride", energy_stride)
        self._energy_count = 0
        # The tokens with the smallest random keys are a uniform sample, also of merged streams.
        self._room = check_index("reservoir", reservoir, 0)
        self._seeds = frozenset({check_index("seed", seed, 0)})
        self._generator = np.random.default_rng(seed)
        self._keys = np.empty(0)
        self._tokens = np.empty((0, d), np.float32)

    def update(self, x: Any) -> ActivationStats:
        """Add the tokens of ``x`` and return self.

        Parameters
        ----------
        x : array (..., d)
            NumPy array or torch tensor of a floating dtype; an empty one adds nothing.

        Raises
        ------
        NonFiniteError
            If ``x`` holds NaN or infinity; nothing has been added then.
        ShapeError, TypeError
            If the last axis is not d long, or the dtype not floating.
        """
        backend = backend_for(x=x)
        check_array("x", x)
        if int(x.shape[-1]) != self.d:
            raise ShapeError(f"x must have d={self.d} channels, got shape {tuple(x.shape)}")
        tokens = int(np.prod(x.shape[:-1]))
        if tokens == 0:
            return self
        if self.token_normalize:
            _check_finite(backend, x)
            x = backend.token_normalize(x)
        sum_abs, sum_square, absmax = backend.moments(x)
        # What is not finite shows in the sums: no pass of its own looks for it.
        if not (np.isfinite(sum_abs).all() and np.isfinite(sum_square).all()):
            _check_finite(backend, x)
        # The sums come last: what runs out of memory before has added nothing.
        if self._gram is not None:
            self._gram = backend.add_gram(self._near(self._gram, backend), x)
        if self._energy_gram is not None:
            # Counting from the middle leaves out a text's first token, which is like no other.
            first = (self._energy_stride // 2 - self._count) % self._energy_stride
            rows = x.reshape(tokens, self.d)[first :: self._energy_stride]
            if len(rows):
                energy = backend.token_normalize(rows)
                total = self._near(self._energy_gram, backend)
                self._energy_gram = backend.add_gram(total, energy * energy)
            self._energy_count += len(rows)
        if self._room:
            self._sample(x, tokens)
        self._sum_abs += sum_abs
        self._sum_square += sum_square
        np.maximum(self._absmax, absmax, out=self._absmax)
        self._count += tokens
        return self

    def merge(self, other: ActivationStats) -> ActivationStats:
        """Return the statistics of both objects' tokens; neither is changed.

        Raises
        ------
        TypeError, ValueError
            If ``other`` is something else, collects other statistics, or drew its sample with a
            seed that this object's was drawn with: both would have kept the same places.
        """
        if not isinstance(other, ActivationStats):
            raise TypeError(f"other must be ActivationStats, got {type(other).__name__}")
        if self._key() != other._key():
            raise ValueError(
                f"other must collect the same statistics {self._key()}, got {other._key()}"
            )
        if self._room and (both := self._seeds & other._seeds):
            raise ValueError(
                "other must have drawn its reservoir with a different seed, "
                f"got {min(both)} in both"
            )
        merged = ActivationStats(
            self.d,
            gram=self._gram is not None,
            energy_gram=self._energy_gram is not None,
            energy_stride=self._energy_stride,
            reservoir=self._room,
            token_normalize=self.token_normalize,
            dtype=self._dtype,
        )
        merged._seeds = self._seeds | other._seeds
        merged._generator = np.random.default_rng(
            [part for one in (self, other) for part in one._words()[:4]]
        )
        merged._count = self._count + other._count
        merged._sum_abs = self._sum_abs + other._sum_abs
        merged._sum_square = self._sum_square + other._sum_square
        merged._absmax = np.maximum(self._absmax, other._absmax)
        if self._gram is not None and other._gram is not None:
            merged._gram = _as_numpy(self._gram) + _as_numpy(other._gram)
        if self._energy_gram is not None and other._energy_gram is not None:
            merged._energy_gram = _as_numpy(self._energy_gram) + _as_numpy(other._energy_gram)
            merged._energy_count = self._energy_count + other._energy_count
        merged._keep(
            np.concatenate([self._keys, other._keys]),
            np.concatenate([self._tokens, other._tokens]),
        )
        return merged

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all that was collected, and the state of the sample's generator, as arrays.

        ``restore`` on an object made with the same parameters goes on from there, bit for bit.

        Examples
        --------
        >>> import numpy as np, corequant as cq
        >>> half, x = cq.ActivationStats(2, reservoir=1), np.array([[1.0, -3.0], [3.0, 1.0]])
        >>> arrays = half.update(x[:1]).to_arrays()
        >>> whole = cq.ActivationStats(2, reservoir=1).restore(arrays).update(x[1:])
        >>> np.array_equal(whole.tokens, half.update(x[1:]).tokens)
        True
        """
        arrays = {
            "count": np.array([self._count, self._energy_count]),
            "generator": np.array(self._words(), np.uint64),
            "sum_abs": self._sum_abs.copy(),
            "sum_square": self._sum_square.copy(),
            "absmax": self._absmax.copy(),
            "keys": self._keys.copy(),
            "tokens": self._tokens.copy(),
        }
        for name, gram in (("gram", self._gram), ("energy_gram", self._energy_gram)):
            if gram is not None:
                arrays[name] = _as_numpy(gram).copy()
        return arrays

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> ActivationStats:
        """Take over what ``to_arrays`` gave, in place of all that was collected; return self.

        Parameters
        ----------
        arrays : mapping of str to numpy.ndarray
            Arrays from ``to_arrays`` of an object with the same parameters.

        Raises
        ------
        ShapeError, ValueError
            If an array is missing or another's; nothing has been taken over then.
        """
        shapes: dict[str, tuple[int, ...]] = {"count": (2,), "generator": (6,)}
        shapes |= dict.fromkeys(("sum_abs", "sum_square", "absmax"), (self.d,))
        for name, gram in (("gram", self._gram), ("energy_gram", self._energy_gram)):
            if gram is not None:
                shapes[name] = (self.d, self.d)
        if missing := [name for name in (*shapes, "keys", "tokens") if name not in arrays]:
            raise ValueError(f"arrays must hold {', '.join(missing)}, got {', '.join(arrays)}")
        kept = min(len(arrays["keys"]), self._room)
        for name, shape in (shapes | {"keys": (kept,), "tokens": (kept, self.d)}).items():
            if tuple(arrays[name].shape) != shape:
                raise ShapeError(f"{name} must have shape {shape}, got {arrays[name].shape}")
        *words, has, rest = (int(word) for word in arrays["generator"])
        self._generator.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {part: words[2 * i] | words[2 * i + 1] << 64 for i, part in enumerate(_PARTS)},
            "has_uint32": has,
            "uinteger": rest,
        }
        self._count, self._energy_count = (int(n) for n in arrays["count"])
        self._sum_abs = arrays["sum_abs"].copy()
        self._sum_square = arrays["sum_square"].copy()
        self._absmax = arrays["absmax"].copy()
        self._keys, self._tokens = arrays["keys"].copy(), arrays["tokens"].copy()
        if self._gram is not None:
            self._gram = arrays["gram"].copy()
        if self._energy_gram is not None:
            self._energy_gram = arrays["energy_gram"].copy()
        return self

    def _sample(self, x: Any, tokens: int) -> None:
        keys = self._generator.random(tokens)
        limit = np.partition(self._keys, -1)[-1] if len(self._keys) == self._room else 1.0
        # Only tokens that get in are copied out of the backend's array.
        chosen = np.flatnonzero(keys < limit)
        chosen = chosen[np.argsort(keys[chosen], kind="stable")[: self._room]]
        rows = _as_numpy(x.reshape(tokens, self.d)[chosen])
        self._keep(
            np.concatenate([self._keys, keys[chosen]]),
            np.concatenate([self._tokens, rows.astype(np.float32)]),
        )

    def _words(self) -> list[int]:
        """State of the generator, in words of 64 bits."""
        state: Any = self._generator.bit_generator.state
        words = [state["state"][part] >> shift & _WORD for part in _PARTS for shift in (0, 64)]
        return [*words, state["has_uint32"], state["uinteger"]]

    def __copy__(self) -> ActivationStats:
        """Copy the sums too: ``update`` adds to them where they are."""
        return copy.deepcopy(self)

    @staticmethod
    def _near(total: Any, backend: Backend) -> Any:
        """Return a sum that the backend of the next tokens can go on with."""
        if isinstance(total, np.ndarray) or backend_for(total=total) is backend:
            return total
        return _as_numpy(total)

    def _keep(self, keys: Vector, tokens: npt.NDArray[np.float32]) -> None:
        first = np.argsort(keys, kind="stable")[: self._room]
        self._keys, self._tokens = keys[first], tokens[first]

    def _key(self) -> tuple[object, ...]:
        return (
            self.d,
            self._gram is not None,
            self._energy_gram is not None,
            self._energy_stride,
            self._room,
            self.token_normalize,
            self._dtype.name,
        )

    @property
    def count(self) -> int:
        """Number n of tokens seen."""
        return self._count

    @property
    def mean_abs(self) -> Vector:
        """Mean of |x| of each channel, float64 (d,)."""
        return self._sum_abs / self._seen()

    @property
    def mean_square(self) -> Vector:
        """Mean of x² of each channel, float64 (d,)."""
        return self._sum_square / self._seen()

    @property
    def absmax(self) -> Vector:
        """Largest |x| of each channel, float64 (d,)."""
        self._seen()
        return self._absmax.copy()

    @property
    def gram(self) -> npt.NDArray[Any]:
        """``H = XᵀX / n`` (d, d), in the dtype chosen."""
        if self._gram is None:
            raise ValueError("gram was not collected; make ActivationStats with gram=True")
        mean: npt.NDArray[Any] = _as_numpy(self._gram) / self._dtype.type(self._seen())
        return mean

    @property
    def energy_gram(self) -> npt.NDArray[Any]:
        """``C = EᵀE / n`` (d, d) of token-normalised energies, in the dtype chosen."""
        if self._energy_gram is None:
            raise ValueError(
                "energy_gram was not collected; make ActivationStats with energy_gram=True"
            )
        if self._energy_count == 0:
            self._seen()
            raise CalibrationError(
                f"energy_gram needs more than {self._count} tokens with energy_stride="
                f"{self._energy_stride}"
            )
        mean: npt.NDArray[Any] = _as_numpy(self._energy_gram) / self._dtype.type(self._energy_count)
        return mean

    @property
    def mean_energy(self) -> Vector:
        """Mean of ``d·x²/‖x‖²`` of each channel, float64 (d,); needs ``energy_gram``."""
        mean: Vector = self.energy_gram.sum(1, dtype=np.float64) / self.d
        return mean

    @property
    def tokens(self) -> npt.NDArray[np.float32]:
        """The sampled tokens, float32 (at most ``reservoir``, d), in random order."""
        return self._tokens.copy()

    def _seen(self) -> int:
        if self._count == 0:
            raise CalibrationError("ActivationStats has seen no tokens; call update first")
        return self._count

    def __repr__(self) -> str:
        """Show d and the number of tokens."""
        return f"ActivationStats(d={self.d}, count={self._count})"


def _as_numpy(array: Any) -> npt.NDArray[Any]:
    """Return an array of any backend as NumPy's."""
    return backend_for(array=array).to_numpy(array)


def _check_finite(backend: Backend, x: Any) -> None:
    bad = backend.first_nonfinite(x)
    if bad is not None:
        raise NonFiniteError("x", *bad)

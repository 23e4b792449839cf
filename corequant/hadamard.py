"""Hadamard matrices in exact integers.

A Hadamard matrix of order n has entries ±1 and ``H @ H.T == n * I``. Every matrix here has the form
``kron(core, sylvester)``: a core of order K and Sylvester's matrix of order 2^k, with K the
smallest order for which ``n == K * 2**k`` and a core is known. K is 1 for powers of two. A core is
built by the first of these that applies:

1. Paley I, for K = q + 1 and a prime power q ≡ 3 (mod 4);
2. Paley II, for K = 2 (q + 1) and a prime power q ≡ 1 (mod 4);
3. Williamson, for K = 4 m and a stored seed of length m;
4. the Kronecker product of two smaller cores, the left one as small as possible.

A core need not be symmetric: the inverse of H is ``H.T / n``, never assume an involution.
"""

from __future__ import annotations

import itertools
import math
import operator
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from corequant.errors import HadamardOrderError

__all__ = ["hadamard_factors", "hadamard_matrix", "hadamard_orders", "valid_block_sizes"]

_Signs: TypeAlias = npt.NDArray[np.int8]

# Trial division takes a few milliseconds up to here; a matrix of this order has 2^62 entries.
_MAX_ORDER = 2**31

# Four symmetric rows of ±1 for each length m: bit i of a number is set where the row is -1 at i
# and at m - i. Only lengths for which neither Paley's constructions nor a product gives 4m.
# Found by tests/golden/search_williamson.py.
_WILLIAMSON_SEEDS: dict[int, tuple[int, int, int, int]] = {
    23: (0x53E, 0x5E0, 0x634, 0x914),
    29: (0xE24, 0x305A, 0x3794, 0x7614),
    39: (0x2BCDC, 0x4D6FC, 0x5F724, 0xC62FA),
    43: (0x375E6, 0x8F134, 0x105AC6, 0x2421EA),
}


def hadamard_matrix(n: int) -> npt.NDArray[np.int8]:
    """Hadamard matrix of order `n`, with exact integer entries.

    The matrix is ``np.kron(core, sylvester)`` with the orders that `hadamard_factors` gives: the
    product of a row with it splits into a small dense product and a fast Walsh-Hadamard transform.
    The choice is deterministic, because quantized weights on disk depend on it.

    Parameters
    ----------
    n : int
        Order of the matrix, at least 1.

    Returns
    -------
    ndarray of int8, shape (n, n)
        Entries +1 and -1 with ``H @ H.T == n * I``. It is read-only because cores are shared
        between calls; copy it to write to it.

    Raises
    ------
    TypeError
        `n` is not an integer; bool is refused.
    HadamardOrderError
        `n` is out of 1..2^31 or has no construction here; the message lists what does work.

    Notes
    -----
    Sources: J. J. Sylvester, Thoughts on inverse orthogonal matrices (1867), for powers of two;
    R. E. A. C. Paley, On orthogonal matrices (1933), for prime powers; J. Williamson, Hadamard's
    determinant theorem and the sum of four squares (1944), for the array of four circulants.

    Examples
    --------
    >>> H = hadamard_matrix(12).astype(int)
    >>> bool((H @ H.T == 12 * np.eye(12, dtype=int)).all())
    True

    """
    core_order, power_of_two = _require_factors(n, "hadamard_matrix")
    matrix = np.kron(_core(core_order), _sylvester(power_of_two))
    matrix.flags.writeable = False
    return matrix


def hadamard_factors(n: int) -> tuple[int, int]:
    """Orders of the two Kronecker factors of ``hadamard_matrix(n)``, without building it.

    Sources: Sylvester (1867), Paley (1933), Williamson (1944), chosen in the module's order.

    Parameters
    ----------
    n : int
        Order of the matrix, at least 1.

    Returns
    -------
    core_order : int
        K, the smallest order with a core and ``n == K * 2**k``; 1 if `n` is a power of two.
    power_of_two : int
        2^k, the order of Sylvester's matrix.

    Raises
    ------
    TypeError
        `n` is not an integer; bool is refused.
    HadamardOrderError
        `n` is out of 1..2^31 or has no construction here.

    Examples
    --------
    >>> hadamard_factors(14336)
    (28, 512)
    >>> hadamard_factors(64)
    (1, 64)

    """
    return _require_factors(n, "hadamard_factors")


def hadamard_orders(limit: int) -> tuple[int, ...]:
    """All orders up to `limit` that `hadamard_matrix` can build.

    Beyond 2 these are multiples of 4, most of them but not all: 188 is the first that lacks.
    Sources: Sylvester (1867), Paley (1933), Williamson (1944).

    Parameters
    ----------
    limit : int
        Largest order to consider, inclusive; below 1 the result is empty.

    Returns
    -------
    tuple of int
        Ascending.

    Raises
    ------
    TypeError
        `limit` is not an integer; bool is refused.
    HadamardOrderError
        `limit` is greater than 2^31.

    Examples
    --------
    >>> hadamard_orders(24)
    (1, 2, 4, 8, 12, 16, 20, 24)

    """
    limit = _as_integer(limit, "hadamard_orders", "limit", minimum=-math.inf)
    candidates = itertools.chain((1, 2), range(4, limit + 1, 4))
    return tuple(n for n in candidates if n <= limit and _factors(n) is not None)


def valid_block_sizes(d: int) -> tuple[int, ...]:
    """Block sizes by which a vector of length `d` can be rotated blockwise.

    Sources: Sylvester (1867), Paley (1933), Williamson (1944).

    Parameters
    ----------
    d : int
        Number of channels, at least 1.

    Returns
    -------
    tuple of int
        All b >= 2 that divide `d` and for which ``hadamard_matrix(b)`` exists, ascending. It is
        empty if `d` is odd, and ends with `d` if the full vector can be rotated.

    Raises
    ------
    TypeError
        `d` is not an integer; bool is refused.
    HadamardOrderError
        `d` is out of 1..2^31.

    Examples
    --------
    >>> valid_block_sizes(48)
    (2, 4, 8, 12, 16, 24, 48)

    """
    d = _as_integer(d, "valid_block_sizes", "d")
    return tuple(b for b in _divisors(d) if b >= 2 and _factors(b) is not None)


class _Construction(NamedTuple):
    """How a core is built; the parameter is q (Paley), m (Williamson) or the left order."""

    method: Literal["paley1", "paley2", "williamson", "kronecker"]
    parameter: int


@lru_cache(maxsize=4096)
def _construction(order: int) -> _Construction | None:
    """First construction of a core that applies to the order; None for powers of two."""
    if order % 4 or order & (order - 1) == 0:
        return None
    if _is_prime_power(order - 1):  # q = order - 1 is 3 modulo 4 because 4 divides the order
        return _Construction("paley1", order - 1)
    if order % 8 == 4 and _is_prime_power(order // 2 - 1):  # so q is 1 modulo 4
        return _Construction("paley2", order // 2 - 1)
    if order // 4 in _WILLIAMSON_SEEDS:
        return _Construction("williamson", order // 4)
    if order % 16:  # the order of each factor is a multiple of 4
        return None
    for left in range(12, math.isqrt(order) + 1, 4):
        # Powers of two have no core, so neither factor can be what belongs to Sylvester's part.
        if order % left == 0 and _construction(left) and _construction(order // left):
            return _Construction("kronecker", left)
    return None


def _factors(n: int) -> tuple[int, int] | None:
    """Core order and power of two for n >= 1, or None if n has no construction."""
    power_of_two = n & -n
    if power_of_two == n:
        return 1, n
    while power_of_two > 1:
        power_of_two //= 2
        if _construction(n // power_of_two):
            return n // power_of_two, power_of_two
    return None


def _require_factors(n: int, function: str) -> tuple[int, int]:
    """Core order and power of two, or the error that says what would work instead."""
    n = _as_integer(n, function, "n")
    factors = _factors(n)
    if factors is not None:
        return factors
    known = valid_block_sizes(n)
    shown = known if len(known) <= 13 else (*known[:12], "...", known[-1])
    raise HadamardOrderError(
        f"{function}: no Hadamard matrix of order n={n} can be constructed "
        f"({_written_out(n)}); block sizes that divide it and work: "
        f"{', '.join(map(str, shown)) or 'none'}"
    )


def _as_integer(value: int, function: str, name: str, minimum: float = 1) -> int:
    """Plain int of any integer type but bool, checked against the bounds."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{function}: {name} must be an integer, got {value!r} of type {type(value).__name__}"
        ) from None
    if number < minimum:
        raise HadamardOrderError(f"{function}: {name} must be at least {minimum}, got {number}")
    if number > _MAX_ORDER:
        raise HadamardOrderError(f"{function}: {name} must be at most {_MAX_ORDER}, got {number}")
    return number


def _factorise(n: int) -> list[tuple[int, int]]:
    """Primes that divide n >= 1 and their exponents, ascending."""
    factors = []
    divisor = 2
    while divisor * divisor <= n:
        exponent = 0
        while n % divisor == 0:
            n //= divisor
            exponent += 1
        if exponent:
            factors.append((divisor, exponent))
        divisor += 1 if divisor == 2 else 2
    return [*factors, (n, 1)] if n > 1 else factors


def _written_out(n: int) -> str:
    """Factorisation as text: 188 = 2^2 · 47, or 47 is prime."""
    factors = _factorise(n)
    if factors == [(n, 1)]:
        return f"{n} is prime"
    return f"{n} = " + " · ".join(f"{p}^{k}" if k > 1 else f"{p}" for p, k in factors)


def _divisors(n: int) -> list[int]:
    powers = [[p**e for e in range(k + 1)] for p, k in _factorise(n)]
    return sorted(math.prod(choice) for choice in itertools.product(*powers))


def _is_prime_power(q: int) -> bool:
    return len(_factorise(q)) == 1


def _quadratic_character(p: int, k: int) -> _Signs:
    """Character χ of GF(p^k), p odd: 0 at zero, +1 at squares, -1 elsewhere; shape (p^k,).

    The element c_0 + c_1 x + c_2 x^2 + ... has the index c_0 + c_1 p + c_2 p^2 + ... .
    """
    for tail in itertools.product(range(p), repeat=k):
        # Multiply by x modulo x^k = tail[0] + tail[1] x + ... . The powers of x meet all non-zero
        # elements exactly if the modulus is primitive, and then the even powers are the squares.
        # With k = 1 this is the search for a primitive root.
        character = np.zeros(p**k, dtype=np.int8)
        element, index, sign, met = [1] + [0] * (k - 1), 1, 1, 0
        while index != 0 and character[index] == 0:
            character[index] = sign
            lead = element[-1]
            element = [(c + lead * t) % p for c, t in zip([0, *element[:-1]], tail, strict=True)]
            index = sum(c * p**i for i, c in enumerate(element))
            sign, met = -sign, met + 1
        if met == p**k - 1:
            return character
    raise AssertionError(f"GF({p}^{k}) has a primitive polynomial")  # unreachable


def _jacobsthal(q: int) -> _Signs:
    """Jacobsthal matrix χ(a - b) over the elements a, b of GF(q), shape (q, q)."""
    ((p, k),) = _factorise(q)
    character = _quadratic_character(p, k)
    places = p ** np.arange(k)
    digits = np.arange(q)[:, None] // places % p
    matrix = np.empty((q, q), dtype=np.int8)
    for row, element in zip(matrix, digits, strict=True):
        row[:] = character[(element - digits) % p @ places]
    return matrix


@lru_cache(maxsize=16)
def _core(order: int) -> _Signs:
    """Core of an order for which there is one; read-only because it is cached."""
    match _construction(order):
        case None:  # order 1
            matrix = np.ones((1, 1), dtype=np.int8)
        case _Construction("paley1", q):
            matrix = _conference(q) + np.eye(q + 1, dtype=np.int8)
        case _Construction("paley2", q):
            matrix = _paley2(q)
        case _Construction("williamson", m):
            matrix = _williamson(_WILLIAMSON_SEEDS[m], m)
        case _Construction(_, left):
            matrix = np.kron(_core(left), _core(order // left))
    matrix.flags.writeable = False
    return matrix


def _sylvester(order: int) -> _Signs:
    matrix = np.ones((order, order), dtype=np.int8)
    half = 1
    while half < order:
        block = matrix[:half, :half]
        matrix[:half, half : 2 * half] = block
        matrix[half : 2 * half, :half] = block
        matrix[half : 2 * half, half : 2 * half] = -block
        half *= 2
    return matrix


def _conference(q: int) -> _Signs:
    """Jacobsthal matrix with a border: zero diagonal, ``C @ C.T == q * I``, shape (q+1, q+1).

    Skew for q ≡ 3 (mod 4), where χ(-1) = -1, and symmetric for q ≡ 1 (mod 4).
    """
    matrix = np.ones((q + 1, q + 1), dtype=np.int8)
    matrix[0, 0] = 0
    matrix[1:, 0] = 1 if q % 4 == 1 else -1
    matrix[1:, 1:] = _jacobsthal(q)
    return matrix


def _paley2(q: int) -> _Signs:
    off_diagonal = np.array([[1, 1], [1, -1]], dtype=np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    identity = np.eye(q + 1, dtype=np.int8)
    return np.kron(_conference(q), off_diagonal) + np.kron(identity, diagonal)


def _williamson(seed: tuple[int, int, int, int], m: int) -> _Signs:
    """Williamson's array of four commuting symmetric circulants, shape (4m, 4m)."""
    difference = np.subtract.outer(np.arange(m), np.arange(m)) % m
    distance = np.minimum(difference, m - difference)
    a, b, c, d = (np.where(bits >> distance & 1, -1, 1).astype(np.int8) for bits in seed)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])

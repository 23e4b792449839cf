"""Random calls of the fused paths, what each must give, and arrays that notice stray accesses.

Every result is compared with the separate steps and, where the format has one here, with a plain
NumPy oracle: the definition written again, an operation at a time.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import contextmanager
from dataclasses import dataclass

import ml_dtypes
import numpy as np

import corequant as cq
from corequant._cpu import arrays
from corequant.formats import FormatKind
from corequant.hadamard import hadamard_factors, hadamard_matrix

__all__ = ["Case", "Guarded", "Kind", "check", "draw", "kinds"]

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
BLOCKS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 192, 320, 512)
SPECS = (
    "int4:token:symmetric",
    "int8:token:asymmetric",
    "int3:channel:asymmetric",
    "int4:group{}:symmetric",
    "int8:group{}:asymmetric",
    "int2:group{}",
    "int4:tensor:symmetric",
    "e2m1:token",
    "e3m2:group{}",
    "mxfp4",
    "nvfp4",
    "mxfp8_e4m3",
    "nf4:group{}",
    "int4:token:mse",
)
LAYOUTS = ("C", "C", "C", "misaligned", "padded", "strided", "reversed", "transposed", "swapped")
PLACES = ("fresh", "out", "in place", "view")

_LONG = 3000
"""Numbers in a row, at most."""

_MANY = 1 << 18
"""Numbers from which on an array is shared out among threads."""

_CANARY = 0xA7


@dataclass(frozen=True)
class Kind:
    """What decides about the kernels that a call needs."""

    dtype: np.dtype
    block: int
    spec: str
    signed: bool
    permuted: bool
    streamed: bool


@dataclass(frozen=True)
class Case:
    """A call: its kind, the shapes, and where the arrays lie."""

    kind: Kind
    rows: int
    d: int
    spec: str
    layout: str
    where: str
    out_layout: str
    threads: int | None
    spread: float
    seed: int


def kinds(generator, count):
    """Draw kinds of calls."""
    return [
        Kind(
            np.dtype(DTYPES[generator.integers(len(DTYPES))]),
            int(generator.choice(BLOCKS)),
            str(generator.choice(SPECS)),
            bool(generator.integers(2)),
            bool(generator.integers(2)),
            bool(generator.integers(4) == 0),
        )
        for _ in range(count)
    ]


def draw(kind, generator):
    """Draw a case of a kind; None where no row length fits its block and its groups."""
    fixed = {"mxfp4": 32, "mxfp8_e4m3": 32, "nvfp4": 16}.get(kind.spec, 1)
    step = int(np.lcm(kind.block, fixed))
    if step > _LONG:
        return None
    d = step * int(generator.integers(1, max(2, min(_LONG // step, 40)) + 1))
    divisors = [g for g in range(1, d + 1) if d % g == 0]
    # Groups of a few numbers make more scales than codes.
    large = [g for g in divisors if g >= min(d, 8)]
    spec = kind.spec.format(int(generator.choice(large)))
    rows = int(generator.integers(1, 6))
    if generator.random() < 0.02:
        rows = _MANY // d + int(generator.integers(1, 40))
    layout = str(generator.choice(LAYOUTS))
    return Case(
        kind,
        rows,
        d,
        spec,
        layout,
        # Results have x's byte order or none.
        "fresh" if layout == "swapped" else str(generator.choice(PLACES)),
        str(generator.choice(LAYOUTS[:-1])),
        [None, 1, 2, 3][generator.integers(4)],
        float(generator.choice([0, 1, 1, 4])),
        int(generator.integers(2**32)),
    )


class Plain:
    """Memory as NumPy gives it."""

    def take(self, size, seed):
        """Return so many bytes, not at their first."""
        return np.empty(size + 16, np.uint8)[16:]

    def seal(self):
        """Make what has been taken readable only."""

    def check(self):
        """Raise if what must not be touched was."""


class Guarded:
    """Memory between pages that nobody may touch; what is left of its own pages is watched.

    A buffer ends with its last page, or begins with its first one. Whoever reads or writes beyond
    that ends the process.
    """

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.taken = []

    def take(self, size, seed):
        page = mmap.PAGESIZE
        inside = -(-max(size, 1) // page) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        whole = np.frombuffer(memory, np.uint8)
        address = whole.ctypes.data
        self._protect(address, page, 0)
        self._protect(address + page + inside, page, 0)
        own = whole[page : page + inside]
        own[:] = _CANARY
        start = inside - size if seed % 2 else 0
        self.taken.append((memory, address + page, inside, own, start, size))
        return own[start : start + size]

    def seal(self):
        for _, address, inside, *_rest in self.taken:
            self._protect(address, inside, mmap.PROT_READ)

    def check(self):
        for *_rest, own, start, size in self.taken:
            rest = np.concatenate([own[:start], own[start + size :]])
            if (rest != _CANARY).any():
                raise AssertionError("memory beside an array was written")

    def _protect(self, address, size, protection):
        done = self.libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection)
        if done:
            raise OSError(ctypes.get_errno(), "mprotect")


def lay(memory, values, layout, seed):
    """Put values (rows, d) into memory of their own, laid out in some way."""
    values = np.asarray(values)
    rows, d = values.shape if values.ndim == 2 else (1, len(values))
    size, dtype = values.itemsize, values.dtype
    offset, strides = 0, (d * size, size)
    match layout:
        case "misaligned":
            offset = 1
        case "padded":
            strides = ((d + 3) * size, size)
        case "strided":
            strides = (2 * d * size, 2 * size)
        case "reversed":
            offset, strides = (rows - 1) * d * size, (-d * size, size)
        case "transposed":
            strides = (size, rows * size)
        case "swapped" if dtype.kind == "f":
            dtype = dtype.newbyteorder()
    extent = offset + size
    extent += sum((n - 1) * step for n, step in zip((rows, d), strides, strict=True) if step > 0)
    room = memory.take(extent, seed)
    array = np.ndarray((rows, d), dtype, room.data, offset, strides)
    array[...] = values
    return array if values.ndim == 2 else array[0]


def check(case, memory=None):
    """Make the call of a case in every way; AssertionError where two of them differ."""
    inputs, outputs = (Plain(), Plain()) if memory is None else (memory(), memory())
    threshold = 1 << 12 if case.kind.streamed else arrays._STREAMED_BYTES
    with _streaming_from(threshold):
        _check(case, inputs, outputs)
    inputs.check()
    outputs.check()


def _check(case, inputs, outputs):
    kind, generator = case.kind, np.random.default_rng(case.seed)
    values = generator.normal(size=(case.rows, case.d)) * np.exp(
        generator.normal(0, case.spread, case.d)
    )
    values[generator.random(values.shape) < 0.05] = 0
    values[generator.random(case.rows) < 0.1] = 0
    if kind.dtype.itemsize == 2:
        # Rotated float16 must stay finite.
        values = np.clip(values, -100, 100)
    values = values.astype(kind.dtype)
    order = generator.permutation(case.d) if kind.permuted else None
    signs = generator.choice(np.array([-1, 1], np.int8), case.d) if kind.signed else None
    x = lay(inputs, values, case.layout, case.seed)
    permutation = None if order is None else lay(inputs, order, "C", case.seed + 1)
    flips = None if signs is None else lay(inputs, signs, "C", case.seed)
    inputs.seal()
    how = {"permutation": permutation, "signs": flips, "threads": case.threads}

    def room(dtype):
        dtype = np.dtype(dtype)
        blank = np.frombuffer(np.full(dtype.itemsize, _CANARY, np.uint8), dtype)[0]
        layout = case.out_layout if case.where != "in place" else "C"
        return lay(outputs, np.full(x.shape, blank, dtype), layout, case.seed >> 1)

    chosen = values if order is None else values[:, order]
    turned = rotated(chosen, kind.block, signs)

    # The rotation itself, into each kind of place.
    _equal(
        cq.block_hadamard(_permuted(x, permutation), kind.block, signs=flips), turned, "rotation"
    )
    if case.where != "fresh":
        start = _permuted(x, permutation)
        target = room(kind.dtype)
        if case.where == "out":
            cq.block_hadamard(start, kind.block, signs=flips, out=target, threads=case.threads)
        else:
            target[...] = start
            same = target[:] if case.where == "view" else target
            cq.block_hadamard(target, kind.block, signs=flips, out=same, threads=case.threads)
        _equal(target, turned, "rotation into out")

    expected = cq.quantize(turned, case.spec)
    _against_oracle(turned, expected)

    codes = room(expected.codes.dtype) if case.where == "out" else None
    found = cq.rotate_quantize(x, kind.block, case.spec, out=codes, **how)
    _same(found, expected)
    if codes is not None:
        _equal(codes, expected.codes, "codes in out")

    numbers = cq.dequantize(expected).astype(_native(kind.dtype))
    if case.where == "fresh":
        got = cq.rotate_fake_quantize(x, kind.block, case.spec, **how)
    else:
        target = room(kind.dtype)
        if case.where == "out":
            got = cq.rotate_fake_quantize(x, kind.block, case.spec, out=target, **how)
        else:
            target[...] = x
            same = target[:] if case.where == "view" else target
            got = cq.rotate_fake_quantize(target, kind.block, case.spec, out=same, **how)
        _equal(target, got, "numbers in out")
    _equal(got, numbers, "numbers")
    _equal(cq.fake_quantize(turned, case.spec), numbers, "fake_quantize")
    _check_packed(case, lay(outputs, turned, "C", case.seed), expected, outputs)


def _check_packed(case, turned, expected, outputs):
    """Compare packing in one pass with packing codes."""
    packed = cq.pack_quantized(expected)
    blank = np.full(packed.packed.shape, _CANARY, np.uint8)
    out = lay(outputs, blank, "C", case.seed >> 2) if case.where != "fresh" else None
    found = cq.quantize_packed(turned, case.spec, out=out)
    _equal(found.packed, packed.packed, "packed codes")
    _equal(found.scales, packed.scales, "packed scales")
    back = cq.unpack_quantized(found)
    _equal(back.codes, expected.codes, "unpacked codes")
    if turned.dtype.itemsize < 8:
        _equal(cq.dequantize_packed(found), cq.dequantize(expected), "packed numbers")


def rotated(x, block, signs):
    """Sign and rotate by definition: butterflies, then the core by fours, rounded once."""
    real = np.float64 if x.dtype.itemsize == 8 else np.float32
    wide = x.astype(real)
    if signs is not None:
        wide = wide * signs.astype(real)
    core, power = hadamard_factors(block)
    y = wide.reshape(-1, core, power)
    half = 1
    while half < power:
        pairs = y.reshape(*y.shape[:2], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([a + b, a - b], axis=-2).reshape(y.shape)
        half *= 2
    if core > 1:
        matrix = hadamard_matrix(core).astype(real)
        total = None
        for m in range(0, core, 4):
            # Of two numbers or sums the first as it is, then both negated: that decides about -0.0.
            s0, s1, s2, s3 = (matrix[m + i, None, :, None] for i in range(4))
            x0, x1, x2, x3 = (y[:, m + i, None, :] for i in range(4))
            four = ((x0 + x1 * (s0 * s1)) + (x2 + x3 * (s2 * s3)) * (s0 * s2)) * s0
            total = four if total is None else total + four
        y = total
    scale = real(1 / np.sqrt(block))
    return (y * scale).reshape(x.shape).astype(_native(x.dtype))


def _against_oracle(y, quantized):
    """Compare codes and scales with what the module of specs says of them."""
    spec, form = quantized.spec, quantized.spec.format
    real = np.float64 if y.dtype.itemsize == 8 else np.float32
    if str(spec.scale_search.value) != "absmax" or spec.granularity.value == "tensor_group":
        return
    whole = spec.granularity.value == "tensor"
    groups = y.astype(real).reshape(
        1 if whole else -1, spec.group_size or (y.size if whole else y.shape[1])
    )
    high = np.abs(groups).max(1, keepdims=True)
    if form.kind is FormatKind.INTEGER:
        least, most = real(form.minimum), real(form.maximum)
        steps = (most - least) / real(2)
        zeros = real(0)
        if spec.symmetric:
            empty = high == 0
            scales = np.where(empty, real(1), high / steps)
        else:
            low = np.minimum(groups.min(1, keepdims=True), real(0))
            high = np.maximum(groups.max(1, keepdims=True), real(0))
            empty = (low == 0) & (high == 0)
            scales = np.where(empty, real(1), (high / real(2) - low / real(2)) / steps)
            zeros = np.clip(np.rint(least - low / scales), least, most)
            zeros = np.where(empty, real(0), zeros)
            _equal(
                quantized.zero_points.reshape(-1), zeros.reshape(-1).astype(np.int8), "zero points"
            )
        codes = np.clip(np.rint(groups / scales) + zeros, least, most).astype(np.int8)
    elif str(spec.scale_format.value) == "e8m0":
        exponent = np.frexp(high)[1] - 1 - int(np.floor(np.log2(float(form.maximum))))
        scales = np.where(high > 0, np.ldexp(1.0, np.maximum(exponent, -127)), 2.0**-127).astype(
            real
        )
        codes = _nearest(groups / scales, form)
    elif form.kind is FormatKind.FLOAT and str(spec.scale_format.value) == "float32":
        scales = np.where(high > 0, high / real(form.maximum), real(1))
        codes = _nearest(groups / scales, form)
    else:
        return
    _equal(quantized.scales.reshape(-1), scales.reshape(-1), "scales by definition")
    _equal(quantized.codes, codes.reshape(y.shape), "codes by definition")


def _nearest(q, form):
    """Codes of the nearest numbers of a minifloat format, of two equally near the even one."""
    magnitudes = np.abs(form.finite_values)
    half = magnitudes[form.finite_values >= 0]
    half = np.unique(half)
    target = np.abs(q.astype(np.float64)).reshape(-1)
    above = np.clip(np.searchsorted(half, target), 1, len(half) - 1)
    low, high = half[above - 1], half[above]
    up = target - low > high - target
    tie = target - low == high - target
    code = above - 1 + (up | (tie & ((above - 1) % 2 == 1)))
    sign = np.signbit(q).reshape(-1).astype(np.int64) << (form.bits - 1)
    return (code + sign).astype(np.uint8).reshape(q.shape)


def _same(found, expected):
    for name in ("codes", "scales", "zero_points", "global_scale"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            _equal(a, b, name)


def _equal(found, expected, what):
    """Compare numbers to the bit, -0.0 and all, whatever their byte order."""
    a, b = (np.ascontiguousarray(v, _native(v.dtype)) for v in (found, expected))
    assert a.shape == b.shape, f"{what}: shapes {a.shape} and {b.shape}"
    assert a.dtype == b.dtype, f"{what}: dtypes {a.dtype} and {b.dtype}"
    differ = a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")
    if differ.any():
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        raise AssertionError(f"{what}: {a[at]} and {b[at]} at {at}, {int(differ.sum())} differ")


def _native(dtype):
    return dtype.newbyteorder("=") if dtype.kind == "f" else dtype


def _permuted(x, permutation):
    return x if permutation is None else x[..., permutation]


@contextmanager
def _streaming_from(size):
    """Have results of so many bytes bypass the cache."""
    before = arrays._STREAMED_BYTES
    arrays._STREAMED_BYTES = size
    try:
        yield
    finally:
        arrays._STREAMED_BYTES = before

"""Every way to cut a rotation into passes gives the same bits, on whatever processor."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import corequant as cq
from corequant._cpu import arrays, rotation
from corequant._cpu.arrays import aligned
from corequant._cpu.codegen import plans as tuning
from corequant._cpu.codegen.plans import Passes, Plan, plan_columns, plan_rows
from corequant._cpu.codegen.rotation_kernels import kernel_for, settings, sign_bits
from corequant._cpu.codegen.vectors import lanes_of
from corequant.hadamard import hadamard_matrix

PASSES = {  # by the vectors in a block; 0 is a block of two numbers
    0: [Passes(4), Passes(8, halved=True)],
    1: [Passes(1), Passes(4, halved=True), Passes(8)],
    4: [Passes(4), Passes(4, halved=True), Passes(2, (2,)), Passes(8)],
    32: [Passes(8, (4,)), Passes(2, (16,), halved=True), Passes(4, (2, 4))],
    256: [Passes(4, (8, 8)), Passes(2, (16, 8), halved=True), Passes(4, (4, 4, 4))],
}


def turned(plan, x, signs):
    y, scratch = aligned(x.size, x.dtype), aligned(plan.scratch + 64)
    y[:] = x
    bits = sign_bits(plan, signs)
    kernel = kernel_for(plan)
    given = settings(
        x.size // plan.unit,
        0.125,
        choices=kernel.choices.ctypes.data,
        signs=(bits.ctypes.data, len(signs), 0),
    )
    kernel(y.ctypes.data, y.ctypes.data, given, scratch.ctypes.data)
    return y.view(np.uint8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("vectors", list(PASSES))
def test_plans_differ_in_speed_alone(dtype, vectors):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    order = vectors * lanes_of(dtype) or 2
    rng = np.random.default_rng(order)
    x = rng.normal(size=1 << 13).astype(kind)
    signs = rng.choice([-1, 1], 4096)
    for where in ("none", "before", "after"):
        plan = plan_rows(dtype, 1, order, False, where, "ordinary")
        expected = turned(replace(plan, paired_loads=False, split=False), x, signs)
        for passes in PASSES[vectors]:
            cut = replace(plan, tile=passes.tile, radices=passes.radices, halved=passes.halved)
            changes = [
                {},
                {"mixed": "all"},
                {"mixed": "most"},
                {"padding": 0},
                {"depth": 2},
                {"depth": 5},
                {"padding": 1},
                {"ahead": 4096},
            ]
            if kind.itemsize > 2:
                changes += [{"in_place": bool(passes.radices), "mixed": "most"}]
            if dtype == "float32" and where != "before":
                changes += [{"paired_loads": True}]
            if dtype == "bfloat16" and (cut.tile > 1 or cut.halved):
                changes += [{"split": True}, {"split": True, "mixed": "all", "depth": 3}]
            for change in changes:
                other = replace(cut, **{"split": False, "in_place": False, **change})
                assert (turned(other, x, signs) == expected).all(), other


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("core", [1, 12, 172])
@pytest.mark.parametrize("stores", ["ordinary", "shifted"])
def test_a_last_pass_along_lines_writes_the_same_and_nothing_else(dtype, core, stores):
    lanes, kind = lanes_of(dtype), np.dtype(dtype)
    plan = replace(
        plan_rows(dtype, core, 32 * lanes, False, "none", "ordinary"),
        **{"tile": 2, "radices": (4, 4), "halved": False, "in_place": True, "depth": 1},
    )
    x = np.random.default_rng(core).normal(size=3 * plan.block).astype(dtype)
    expected = turned(plan, x, np.ones(plan.block))
    along = replace(plan, whole_lines=True, stores=stores, in_place=stores == "ordinary", padding=0)
    kernel, scratch = kernel_for(along), aligned(along.scratch + 64)
    given = settings(3, 0.125, choices=kernel.choices.ctypes.data)
    for before in range(kind.itemsize, 64, 20 if kind.itemsize == 4 else 24):
        room = np.full(x.nbytes + 192, 7, np.uint8)
        start = -room.ctypes.data % 64 + 64 + before
        y = room[start : start + x.nbytes].view(dtype)
        source = x if stores == "shifted" else y
        source[:] = x
        kernel(source.ctypes.data, y.ctypes.data, given, scratch.ctypes.data)
        assert (y.view(np.uint8) == expected).all()
        assert (np.delete(room, slice(start, start + x.nbytes)) == 7).all()


@pytest.mark.parametrize("core", [1, 12])
def test_results_of_several_threads_meet_within_a_line(monkeypatch, rng, core):
    """What one thread writes of a line must not undo what another one has written."""
    block = core * 1024
    x = rng.normal(size=(400, block)).astype(np.float32)
    expected = cq.block_hadamard(x, block, threads=1)
    room = np.full(x.size + 32, 7, np.float32)
    start = -room.ctypes.data % 64 // 4 + 3
    out = room[start : start + x.size].reshape(x.shape)
    for streamed in (0, 1 << 40):
        monkeypatch.setattr(arrays, "_STREAMED_BYTES", streamed)
        out[...] = 0
        cq.block_hadamard(x, block, out=out, threads=2)
        np.testing.assert_array_equal(out, expected)
        assert (room[:start] == 7).all()
        assert (room[start + x.size :] == 7).all()


@pytest.mark.parametrize("block", [4096, 28 * 512])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotations_anywhere_in_a_line_are_the_same(rng, block, signed, inverse):
    x = rng.normal(size=(3, block)).astype(np.float32)
    signs = rng.choice(np.array([-1, 1], np.int8), block) if signed else None
    expected = cq.block_hadamard(x, block, inverse=inverse, signs=signs)
    room = aligned(x.size + 16, np.dtype(np.float32))
    for numbers in (1, 4, 15):
        y = room[numbers : numbers + x.size].reshape(x.shape)
        for source in (x, y):
            y[...] = x
            cq.block_hadamard(source, block, inverse=inverse, signs=signs, out=y)
            np.testing.assert_array_equal(y, expected)


FAMILIES = [tuning._ZEN4, tuning._ZEN5, tuning._INTEL, tuning._NEON]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stores", ["ordinary", "across", "streamed", "shifted"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_passes_cover_every_block_size(monkeypatch, family, stores, dtype):
    monkeypatch.setattr("corequant._cpu.codegen.plans.tuning", lambda: family)
    for core in (1, 12, 172):
        for power in (1 << k for k in range(4 if core > 1 else 1, 16)):
            plan = plan_rows.__wrapped__(dtype, core, power, False, "none", stores)
            # All passes together combine as many vectors as are in a power.
            vectors = max(1, power // plan.lanes)
            assert plan.tile * np.prod(plan.radices, dtype=int) >= vectors
            assert plan.radices == () or plan.tile * np.prod(plan.radices) == vectors
            assert plan.unit % plan.block == 0
            assert not plan.split or plan.tile > 1 or plan.halved
            assert plan.kept == 0 or plan.kept >= plan.block * (4 if dtype != "float64" else 8)
            assert not (
                plan.in_place
                and (stores in ("streamed", "shifted") or dtype in ("float16", "bfloat16"))
            )
            assert plan.in_place or plan.stores == "shifted" or not plan.whole_lines
            assert not (plan.whole_lines and plan.batch)
            # Half lines of many rows would be flushed before their other halves come.
            half = dtype == "float16" and plan.stores == "streamed"
            assert not half or max(core, *plan.radices, 0) <= 8


@pytest.fixture
def fresh_plans():
    """Forget plans before and after, since they were made for the processor at hand."""
    for made in (plan_rows, rotation._row_kernel):
        made.cache_clear()
    yield
    for made in (plan_rows, rotation._row_kernel):
        made.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_left_by_streamed_units_is_rotated(monkeypatch, fresh_plans, family, dtype):
    """Those of a family may be shorter than its ordinary ones, or longer."""
    monkeypatch.setattr("corequant._cpu.codegen.plans.tuning", lambda: family)
    monkeypatch.setattr(arrays, "_STREAMED_BYTES", 0)
    rng = np.random.default_rng(0)
    for block in (16, 32, 64, 128, 512, 1024):
        for blocks in (1, 2, 3, 7, 13):
            x = rng.integers(-8, 9, (blocks, block)).astype(dtype)
            signs = rng.choice(np.array([-1, 1], np.int8), block)
            signed = (x * signs.astype(dtype)).astype(np.float64)
            expected = signed @ hadamard_matrix(block) / np.sqrt(block)
            for room in (x.size, x.size + 1):
                # On a line of the cache, and off it.
                out = aligned(room, np.dtype(dtype))[room - x.size :].reshape(x.shape)
                cq.block_hadamard(x, block, signs=signs, out=out)
                np.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("halved", [False, True])
def test_bits_flip_the_signs_that_they_mean(dtype, halved):
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, 256).astype(kind)
    signs = rng.choice([-1, 1], 64)
    signed = (x.reshape(-1, 64) * signs.astype(kind)).ravel()
    for where, expected in (("before", signed), ("after", x)):
        plan = replace(plan_rows(dtype, 1, 16, False, where, "ordinary"), tile=4, halved=halved)
        plain = replace(plan, signs="none")
        found = turned(plan, x, signs).view(kind)
        wanted = turned(plain, expected, signs).view(kind)
        if where == "after":
            wanted = (wanted.reshape(-1, 64) * signs.astype(kind)).ravel()
        np.testing.assert_array_equal(found, wanted)


def test_a_plan_is_read_back_from_its_text():
    for plan in (
        plan_rows("bfloat16", 12, 64, True, "after", "streamed"),
        plan_columns("float32", 1, 256, False, "before", "ordinary"),
    ):
        assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize("name", ["generic", "haswell", "skylake-avx512", "znver3", "znver4"])
def test_tiles_fit_the_registers(monkeypatch, name):
    """A vector of 64 bytes takes two of a processor's 16 registers, or one of 32."""
    monkeypatch.setattr(tuning, "processor", lambda: (name, ""))
    chosen = tuning.tuning.__wrapped__()
    vectors = 32 if name in ("skylake-avx512", "znver4") else 8
    for power in (1 << k for k in range(10)):
        passes = chosen.passes(power, "float32")
        assert max(passes.tile, *passes.radices, 1) <= vectors
        # Tiles under way are carried in registers from turn to turn.
        assert chosen.depth == 1 or chosen.depth * chosen.single <= vectors

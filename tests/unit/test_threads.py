from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import corequant as cq
from corequant._cpu import arrays, rotation
from corequant._cpu import threads as _threads
from corequant._cpu.codegen.rotation_kernels import Context, piece, settings
from corequant._cpu.codegen.team import ASLEEP, LOOKING, Word


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_ranges_cover_the_rows_once(threads, use_threads):
    use_threads(7)
    seen = np.zeros(1001, int)
    ranges = []

    def work(first, last):
        seen[first:last] += 1
        ranges.append((first, last))

    _threads.for_rows(1001, 1 << 20, work, threads)
    assert (seen == 1).all()
    assert len(ranges) == threads


def test_where_callers_are_enough_each_works_alone(use_threads):
    use_threads(3)
    seen = []

    def work(first, last):
        seen.append((threading.get_ident(), last - first))

    claims = [_threads._crew.claim(0) for _ in range(2)]
    _threads.for_rows(64, 1 << 20, work)
    assert seen == [(threading.get_ident(), 64)]
    _threads._crew.release(claims.pop())
    _threads.for_rows(64, 1 << 20, work)
    assert [rows for _, rows in seen[1:]] == [32, 32]
    _threads._crew.release(claims.pop())
    assert _threads._crew.working == 0


def test_a_caller_does_what_no_helper_has_begun(monkeypatch, use_threads):
    monkeypatch.setattr(_threads._Helper, "_help", lambda self: None)
    monkeypatch.setattr(_threads, "_crew", _threads._Crew())
    use_threads(4)
    done = []
    _threads.for_rows(64, 1 << 20, lambda first, last: done.extend(range(first, last)))
    assert done == list(range(64))
    turn(64, threads=4)


def test_helpers_sleep_work_and_sleep_again(monkeypatch, use_threads):
    use_threads(3)
    monkeypatch.setattr(_threads, "_crew", _threads._Crew())
    for _ in range(20):
        turn(1024, threads=3)
        assert _threads._crew.working == 0
    assert len(_threads._crew.idle) == 2
    fell_asleep(_threads._crew)
    # What the interpreter is needed for goes to the same helpers, awake or not.
    for pause in (0, 0.01, 0):
        seen = []
        _threads.for_rows(64, 1 << 20, lambda first, last, s=seen: s.extend(range(first, last)))
        assert sorted(seen) == list(range(64))
        turn(1024, threads=3)
        time.sleep(pause)
    fell_asleep(_threads._crew)


def test_a_helper_takes_part(monkeypatch, use_threads):
    use_threads(2)
    monkeypatch.setattr(_threads, "_crew", _threads._Crew())

    def idle(job, *rest):
        ctypes.c_int64.from_address(job + 8 * Word.UNFINISHED).value = 0

    # A caller that doesn't work, so that a helper must.
    monkeypatch.setattr(_threads, "lead", lambda: idle)
    x = np.ones((1, 1 << 20), np.float32)
    helpers = _threads._crew.claim(1)
    kernel = rotation._row_kernel("float32", 64, False, "none", "ordinary")
    units = x.size // kernel.unit
    given = settings(units, kernel.scale, choices=0)
    context = Context(kernel.call, 4 * kernel.unit, kernel.unit)
    job = _threads._Job(piece(), units, 16, 2)
    job.finish(helpers, context(x.ctypes.data, x.ctypes.data, given), 0, kernel.scratch)
    helpers[0].mailbox[Word.STATE] = job.address
    # It may have fallen asleep meanwhile.
    helpers[0].tasks.put(None)
    deadline = time.monotonic() + 60
    while helpers[0].mailbox[Word.STATE] not in (LOOKING, ASLEEP):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    _threads._crew.release(helpers)
    np.testing.assert_array_equal(x, np.where(np.arange(x.size) % 64, 0, 8).reshape(x.shape))


def test_nothing_is_let_go_while_a_helper_works(monkeypatch):
    monkeypatch.setattr(_threads._Helper, "_help", lambda self: None)
    helper = _threads._Helper(1)
    working = max(LOOKING, ASLEEP) + 1
    helper.mailbox[Word.STATE] = working
    slept = []

    def interrupted(seconds):
        slept.append(seconds)
        if len(slept) == 1:
            raise KeyboardInterrupt
        helper.mailbox[Word.STATE] = LOOKING

    monkeypatch.setattr(_threads.time, "sleep", interrupted)
    monkeypatch.setattr(_threads, "_PATIENCE", 1e-6)
    x = np.ones((4, 64), np.float32)
    kernel = rotation._row_kernel("float32", 64, False, "none", "ordinary", x.size)
    context = Context(kernel.call, 4 * kernel.unit, kernel.unit)
    job = _threads._Job(piece(), x.size // kernel.unit, 1, 2)
    given = context(x.ctypes.data, x.ctypes.data, settings(1, kernel.scale, choices=0))
    with pytest.raises(KeyboardInterrupt):
        job.finish([helper], given, arrays.scratch.at_least(kernel.scratch), kernel.scratch)
    assert len(slept) == 2
    np.testing.assert_array_equal(x[:, 0], 8)


def test_sleeping_helpers_are_woken_for_much_work_or_soon_after_other(monkeypatch, use_threads):
    use_threads(2)
    claimed = []
    claim = _threads._Crew.claim
    monkeypatch.setattr(_threads._Crew, "claim", lambda s, n: claimed.append(n) or claim(s, n))
    # A caller whose helper is late sleeps as long, and a helper goes on looking.
    for awake, worth in ((1e-9, 1 << 40), (5, 1 << 40), (1e-9, 1)):
        monkeypatch.setattr(_threads, "_AWAKE", awake)
        monkeypatch.setattr(_threads, "_WORTH_WAKING", worth)
        rotation._rows.cache_clear()
        cq.block_hadamard(np.ones((512, 4096), np.float32), 64, threads=2)
    assert claimed == [0, 1, 1]


def turn(rows, threads):
    """Rotate with and without signs, and compare with one thread."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 4096)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "_PER_THREAD", 1 << 12)
        rotation._rows.cache_clear()
        for signs in (None, cq.random_signs(4096, 1)):
            for order in (32, 4096):
                one = cq.block_hadamard(x, order, signs=signs, threads=1)
                many = cq.block_hadamard(x, order, signs=signs, threads=threads)
                np.testing.assert_array_equal(many, one)


def fell_asleep(crew):
    deadline = time.monotonic() + 60
    while any(h.mailbox[Word.STATE] != ASLEEP or not h.tasks.empty() for h in crew.idle):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_small_work_stays_with_the_caller():
    assert _threads.one_part(8, 100, None, 1000)
    assert _threads.one_part(1 << 20, 100, 1, 1000)
    assert not _threads.one_part(80, 100, None, 1000)


def test_results_do_not_depend_on_the_number_of_threads(rng, use_threads):
    x = rng.normal(size=(512, 1536)).astype(np.float32)
    results = []
    for count in (1, 2, 5):
        use_threads(count)
        results.append(cq.fake_quantize(cq.block_hadamard(x), "int4:token:asymmetric"))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_an_error_in_a_thread_reaches_the_caller(use_threads):
    use_threads(2)

    def work(first, last):
        if first:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _threads.for_rows(64, 1 << 20, work, 2)


def test_many_callers_at_once(rng):
    x = rng.normal(size=(256, 1024)).astype(np.float32)
    expected = cq.block_hadamard(x, 64)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: cq.block_hadamard(x, 64), range(32)):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forking is POSIX only")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(rng, use_threads):
    use_threads(2)
    x = rng.normal(size=(256, 1024)).astype(np.float32)
    expected = cq.block_hadamard(x, 64)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.apply_async(cq.block_hadamard, (x, 64)).get(timeout=60)
    np.testing.assert_array_equal(result, expected)


def test_an_interrupted_call_waits_for_its_helpers():
    """Otherwise they would go on writing to what the caller has back."""
    finished, started = threading.Event(), threading.Event()

    def work(start, stop):
        if threading.current_thread() is threading.main_thread():
            assert started.wait(60)
            raise KeyboardInterrupt
        started.set()
        time.sleep(0.3)
        finished.set()

    share = _threads._Share(2, work, 2)
    helpers = [_threads._Helper(1000)]
    with pytest.raises(KeyboardInterrupt):
        share.finish(helpers)
    assert finished.is_set()


def test_a_handler_may_call_while_its_thread_claims_helpers():
    crew = _threads._Crew()
    with crew.lock:
        taken = crew.claim(0)
        crew.release(taken)
    assert crew.working == 0


def test_a_larger_scratch_leaves_the_one_that_was_handed_out():
    scratch = arrays._Scratch()
    first = scratch.at_least(1 << 12)
    second = scratch.at_least(1 << 14)
    assert first != second
    assert [arrays.address_of(m) for m in scratch.memory] == [first, second]
    assert scratch.at_least(1 << 13) == second

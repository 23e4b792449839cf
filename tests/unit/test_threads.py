from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import corequant as cq
from corequant import _threads


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_ranges_cover_the_rows_once(threads, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "7")
    seen = np.zeros(1001, int)
    ranges = []

    def work(first, last):
        seen[first:last] += 1
        ranges.append((first, last))

    _threads.for_rows(1001, 1 << 20, work, threads)
    assert (seen == 1).all()
    assert len(ranges) == threads


def test_where_callers_are_enough_each_works_alone(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    seen = []

    def work(first, last):
        seen.append((threading.get_ident(), last - first))

    with _threads._crew.helpers(0), _threads._crew.helpers(0):
        _threads.for_rows(64, 1 << 20, work)
    assert seen == [(threading.get_ident(), 64)]
    with _threads._crew.helpers(0):
        _threads.for_rows(64, 1 << 20, work)
    assert [rows for _, rows in seen[1:]] == [32, 32]
    assert _threads._crew.working == 0


def test_a_caller_does_what_no_helper_has_begun(monkeypatch):
    monkeypatch.setattr(_threads._Crew, "_help", lambda self: None)
    _threads._start_anew()
    monkeypatch.setenv("NUMBA_NUM_THREADS", "4")
    done = []
    _threads.for_rows(64, 1 << 20, lambda first, last: done.extend(range(first, last)))
    assert done == list(range(64))
    _threads._start_anew()


def test_small_work_stays_with_the_caller():
    assert _threads.one_part(8, 100, None, 1000)
    assert _threads.one_part(1 << 20, 100, 1, 1000)
    assert not _threads.one_part(80, 100, None, 1000)


def test_results_do_not_depend_on_the_number_of_threads(rng, monkeypatch):
    x = rng.normal(size=(512, 1536)).astype(np.float32)
    results = []
    for count in ("1", "2", "5"):
        monkeypatch.setenv("NUMBA_NUM_THREADS", count)
        results.append(cq.fake_quantize(cq.block_hadamard(x), "int4:token:asymmetric"))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")

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
def test_a_forked_child_has_threads_of_its_own(rng, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    x = rng.normal(size=(256, 1024)).astype(np.float32)
    expected = cq.block_hadamard(x, 64)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.apply_async(cq.block_hadamard, (x, 64)).get(timeout=60)
    np.testing.assert_array_equal(result, expected)

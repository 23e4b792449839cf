"""Independent problems through executors: the functions are pure and their results travel."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

import corequant as cq
from tests.property.test_rounding import layer, moments


def problems():
    for seed in range(6):
        W, x, q = layer(seed, rows=40, d=96 + 32 * seed, dtype=np.float32)
        H, G = moments(x, q)
        yield cq.qronos, (W, H, G, "int4:channel")
        yield cq.gptq, (W, H, "mxfp4")
        yield cq.gpfq, (W, H, G, cq.QuantSpec.parse("e2m1:channel"))


@pytest.fixture(scope="module")
def expected():
    return [call(*arguments) for call, arguments in problems()]


def threads():
    return ThreadPoolExecutor(4)


def processes():
    # A fork of a process with threads may hang; fresh processes share nothing.
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


@contextmanager
def distributed():
    from distributed import Client, LocalCluster

    # Workers in this process: what is tested is the executor, not its transport.
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False}
    with LocalCluster(dashboard_address=None, **options) as cluster, Client(cluster) as client:
        yield client.get_executor()


@pytest.mark.parametrize("make", [threads, processes, distributed])
def test_the_same_results_through_any_executor(make, expected):
    with make() as executor:
        futures = [executor.submit(call, *arguments) for call, arguments in problems()]
        results = [future.result() for future in futures]
    for found, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(found.codes, wanted.codes)
        np.testing.assert_array_equal(found.scales, wanted.scales)
        assert found.report == wanted.report
        assert found.spec == wanted.spec


def test_statistics_merge_to_the_same_codes():
    W, x, _ = layer(0)
    parts = np.array_split(x, 5)
    with ThreadPoolExecutor(3) as pool:
        stats = list(pool.map(count, parts))
    merged = stats[0]
    for other in stats[1:]:
        merged = merged.merge(other)
    wanted = cq.gptq(W, count(x).gram, "int4:channel")
    np.testing.assert_array_equal(cq.gptq(W, merged.gram, "int4:channel").codes, wanted.codes)


def count(part):
    return cq.ActivationStats(64, gram=True, dtype=np.float64).update(part)

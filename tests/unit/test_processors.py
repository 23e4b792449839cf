from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corequant._cpu import processors, threads
from corequant._cpu.processors import cpu_quota


def fake(folder: Path, group: str, limits: dict[str, str], version: int, root: str = "/") -> Path:
    """Write a process's folder, and its groups below a mount point with a space in its name."""
    mount, process = folder / "the groups", folder / "self"
    for name, text in limits.items():
        (mount / name).mkdir(parents=True, exist_ok=True)
        if version == 2:
            (mount / name / "cpu.max").write_text(f"{text}\n")
        else:
            for file, number in zip(("quota", "period"), text.split(), strict=True):
                (mount / name / f"cpu.cfs_{file}_us").write_text(f"{number}\n")
    place = str(mount).replace(" ", "\\040")
    kind = "cgroup2 cgroup rw" if version == 2 else "cgroup cgroup rw,cpu,cpuacct"
    line = f"0::{group}" if version == 2 else f"4:cpu,cpuacct:{group}\n3:memory:/m:n\n0::/other"
    process.mkdir(exist_ok=True)
    (process / "cgroup").write_text(f"{line}\n")
    (process / "mountinfo").write_text(
        f"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        f"31 22 0:28 {root} {place} rw,nosuid shared:9 master:3 - {kind}\n"
        "33 22 0:30 / /nowhere rw - cgroup cgroup rw,memory\n"
    )
    return process


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_quota_from_the_group_to_the_outermost_counts(tmp_path, version):
    none = "max 100000" if version == 2 else "-1 100000"
    limits = {"": none, "a": none, "a/b": none, "a/b/c": none, "other": "10000 100000"}
    process = fake(tmp_path, "/a/b", limits, version)
    assert cpu_quota(process) == math.inf
    for name, text, expected in (
        ("a/b/c", "10000 100000", math.inf),
        ("a/b", "400000 100000", 4),
        ("a", "75000 50000", 1.5),
        ("", "200000 100000", 1.5),
        ("a/b", "50000 100000", 0.5),
    ):
        fake(tmp_path, "/a/b", {name: text}, version)
        assert cpu_quota(process) == expected


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("group", "root", "expected"),
    [("/pod/a", "/pod", 3), ("/pod", "/pod", 5), ("/", "/", 5), ("/../x", "/", 5), ("/x", "/y", 5)],
)
def test_groups_are_found_below_what_is_mounted(tmp_path, version, group, root, expected):
    process = fake(tmp_path, group, {"": "5 1", "a": "3 1", "x": "1 1"}, version, root)
    assert cpu_quota(process) == expected


def test_no_groups_no_files_and_damaged_files_are_no_limit(tmp_path):
    assert cpu_quota(tmp_path) == math.inf
    for text in ("", "1", "0 100000", "100000 0", "many 1"):
        assert cpu_quota(fake(tmp_path, "/", {"": text}, 2)) == math.inf
    (tmp_path / "self" / "cgroup").write_text("")
    assert cpu_quota(tmp_path / "self") == math.inf


@pytest.mark.parametrize(
    ("quota", "pythons", "expected"),
    [
        (math.inf, None, 6),
        (0.01, None, 1),
        (1.0, None, 1),
        (1.5, None, 2),
        (5.001, None, 6),
        (64.0, None, 6),
        (math.inf, 4, 4),
        (2.5, 4, 3),
        (math.inf, 64, 6),
    ],
)
def test_threads_are_no_more_than_processors(monkeypatch, quota, pythons, expected):
    monkeypatch.setattr(processors, "_quota_in", lambda period: quota)
    monkeypatch.setattr(processors, "_PYTHONS", pythons and (lambda: pythons))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert threads.thread_count() == expected
    for wanted, found in (("1", 1), ("100", expected), ("0", expected), ("many", expected)):
        monkeypatch.setenv("NUMBA_NUM_THREADS", wanted)
        assert threads.thread_count() == found


def test_a_system_without_affinity_has_the_processors_that_python_counts(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(processors, "_quota_in", lambda period: math.inf)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    for pythons, expected in ((None, 7), (lambda: 3, 3), (lambda: None, 1)):
        monkeypatch.setattr(processors, "_PYTHONS", pythons)
        assert processors.processor_count() == expected


def test_a_quota_that_changes_is_noticed(monkeypatch):
    now, quota = [1000.0], [2.0]
    monkeypatch.setattr(processors.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(processors, "cpu_quota", lambda: quota[0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    processors._quota_in.cache_clear()
    assert processors.processor_count() == 2
    quota[0] = 3.0
    assert processors.processor_count() == 2
    now[0] += 2 * processors._KEPT
    assert processors.processor_count() == 3
    processors._quota_in.cache_clear()


@pytest.fixture
def one_processor() -> Iterator[Path]:
    """Make a group of our own with the time of one processor, and one in it."""
    for mount, quota in (
        (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us"),
        (Path("/sys/fs/cgroup/cpu,cpuacct"), "cpu.cfs_quota_us"),
        (Path("/sys/fs/cgroup"), "cpu.max"),
    ):
        outer = mount / f"corequant-{os.getpid()}"
        try:
            outer.mkdir()
        except OSError:
            continue
        if (outer / quota).exists():
            break
        outer.rmdir()
    else:
        pytest.skip("needs the right to make control groups")
    (outer / quota).write_text("100000" if quota != "cpu.max" else "100000 100000")
    (outer / "inner").mkdir()
    yield outer / "inner"
    (outer / "inner").rmdir()
    outer.rmdir()


_PROGRAM = """
import os, sys
if sys.argv[1:]:
    open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
import numba, scipy.linalg, numpy as np, corequant as cq
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
x = np.random.default_rng(0).normal(size=(8192, 512)).astype(np.float32)
stats = cq.ActivationStats(512, gram=True).update(x)
cq.block_hadamard(x, 64, out=x)
cq.rotate_quantize(x, 64, "mxfp4")
cq.quantize(x, "int4:token:asymmetric")
cq.gptq(x[:512], stats.gram, "int4:channel")
print(threads() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_group_of_one_processor_never_has_two_threads(one_processor):
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, "1")}
    environment.pop("NUMBA_NUM_THREADS", None)

    def started(*arguments: str) -> int:
        command = [sys.executable, "-c", _PROGRAM, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert started() == len(os.sched_getaffinity(0)) - 1
    assert started(str(one_processor)) == 0
    environment["NUMBA_NUM_THREADS"] = "8"
    assert started(str(one_processor)) == 0

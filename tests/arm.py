"""Run the digests and the core's tests on ARM64, emulated by QEMU on a machine that isn't.

Usage: python tests/arm.py [--folder FOLDER] [--only {digests,tests}] [PYTEST_ARGUMENT ...]

Everything that it needs goes into one folder, without the rights of root: an ARM64 Python and its
libraries from the archive that apt knows (Debian's, or a derivative's that has arm64), QEMU from
there too unless it is installed, and ARM64 wheels by pip. Neither is installed anywhere else: they
are unpacked. Deleting the folder undoes it all.

The digests of ``tests/digests.py`` must be those of this machine. Then come the unit, property,
conformance and reference tests that need neither torch nor Transformers; what is left out is
printed. Arguments that aren't known here are pytest's, such as ``-n 2``, or a test file, which
takes the place of all. Emulation is 10 to 20 times as slow as a processor: the digests take
minutes, all tests hours. QEMU shows no fault of memory order that this machine's own processor
forbids.

Host detection sees this machine's ``/proc/cpuinfo`` under some releases of QEMU, and so code is
compiled for processors that are named: ``generic`` for the tests, others too for the digests.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ["python3", "libstdc++6"]
WHEELS = ["numpy", "scipy", "numba", "ml_dtypes", "array-api-strict"]
WHEELS += ["hypothesis", "pytest", "pytest-xdist"]
# An older baseline's wheels run on a newer system, but pip takes only those that are named.
PLATFORMS = ["manylinux2014"] + [f"manylinux_2_{minor}" for minor in (17, 24, 26, 27, 28, 31, 34)]
CPU = "neoverse-n1"
"""What is emulated: a processor of servers that has no vectors longer than NEON's."""
PROCESSORS = ["generic", CPU]
"""What the digests' code is compiled for."""
TESTS = ["tests/property", "tests/conformance", "tests/unit", "tests/reference"]

UNFIT = {
    "tests/unit/test_imports.py::test_import_takes_less_than_50_ms_beyond_numpy": "it is timed",
    "tests/unit/test_instruction_sets.py": "it compares the digests once more",
}
"""Tests that emulation has no use for, and why."""


def run(*command: str | Path, **environment: str) -> None:
    """Run a command to its end, or end with what it says."""
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def unpack(folder: Path, architecture: str, packages: list[str], into: Path) -> None:
    """Download packages and what they depend on by apt, without root, and unpack them."""
    apt = folder / f"apt-{architecture}"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    lines = [f'{name} "{value}";\n' for name, value in settings.items()]
    (apt / "apt.conf").write_text("#clear APT::Architectures;\n" + "".join(lines), "utf-8")
    chosen = {"APT_CONFIG": str(apt / "apt.conf")}
    run("apt-get", "-qq", "update", **chosen)
    run("apt-get", "-qq", "-y", "--download-only", "install", *packages, **chosen)
    into.mkdir(parents=True, exist_ok=True)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run("dpkg", "-x", package, into)
    shutil.rmtree(apt)


def emulator(folder: Path) -> str:
    """Return QEMU's program for ARM64, installed or unpacked."""
    names = ("qemu-aarch64-static", "qemu-aarch64")
    for name in names:
        if found := shutil.which(name):
            return found
    native = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
    unpack(folder, native, ["qemu-user-static"], folder / "qemu")
    for name in names:
        unpacked = folder / "qemu" / "usr" / "bin" / name
        if unpacked.exists():
            kept = unpacked.rename(folder / name)
            # The package has a program for every other processor too.
            shutil.rmtree(folder / "qemu")
            return str(kept)
    sys.exit("the package qemu-user-static has no qemu-aarch64: install QEMU's user mode emulation")


def prepare(folder: Path) -> Path:
    """Return the ARM64 Python, a script that lies where a virtual environment has its own."""
    python, stamp = folder / "bin" / "python", folder / "made-from"
    sources = [Path(__file__).read_bytes(), (ROOT / "constraints.txt").read_bytes()]
    made_from = hashlib.sha256(b"".join(sources)).hexdigest()
    if stamp.exists() and stamp.read_text("utf-8") == made_from:
        return python
    for name in ("apt-get", "dpkg"):
        if not shutil.which(name):
            sys.exit(f"{name} is needed, which Debian and its derivatives have")
    for part in ("sysroot", "qemu", "lib", "bin", "compiled"):
        shutil.rmtree(folder / part, ignore_errors=True)
    sysroot = folder / "sysroot"
    unpack(folder, "arm64", PACKAGES, sysroot)
    version = (sysroot / "usr" / "bin" / "python3").readlink().name
    qemu = emulator(folder)
    site = folder / "lib" / version / "site-packages"
    tags = [part for name in PLATFORMS for part in ("--platform", f"{name}_aarch64")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", *tags]
    pip += ["--python-version", version.removeprefix("python"), "--implementation", "cp"]
    run(*pip, "--target", site, "-c", ROOT / "constraints.txt", *WHEELS)
    python.parent.mkdir(exist_ok=True)
    home = sysroot / "usr" / "bin"
    (folder / "pyvenv.cfg").write_text(f"home = {home}\n", "utf-8")
    # A process that starts ``sys.executable`` gets this script again: nothing is registered with
    # the kernel, which root alone could do.
    command = f'exec "{qemu}" -cpu {CPU} -L "{sysroot}" -0 "$0" "{home / version}" "$@"'
    python.write_text(f"#!/bin/sh\n{command}\n", "utf-8")
    python.chmod(0o755)
    stamp.write_text(made_from, "utf-8")
    return python


def digests(python: str | Path, **environment: str) -> list[str]:
    """Return the lines of ``tests/digests.py``."""
    command = [python, ROOT / "tests" / "digests.py"]
    chosen = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.check_output(command, env=chosen, text=True).splitlines()


def main() -> None:
    """Prepare the folder, compare the digests, run the tests."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=caches / "corequant" / "arm64")
    parser.add_argument("--only", choices=["digests", "tests"])
    options, given = parser.parse_known_args()
    if platform.machine().lower() in ("aarch64", "arm64"):
        sys.exit("this machine is ARM64: make test runs everything there, not emulated")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = prepare(folder)
    environment = {
        "PYTHONPATH": str(ROOT),
        "NUMBA_CACHE_DIR": str(folder / "compiled"),
        "NUMBA_CPU_FEATURES": "",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if options.only != "tests":
        expected = digests(sys.executable)
        for name in PROCESSORS:
            found = digests(python, NUMBA_CPU_NAME=name, **environment)
            for line in sorted(set(found) ^ set(expected)):
                print(f"{'aarch64' if line in found else platform.machine()}: {line}")
            print(f"{name}: {len(set(found) & set(expected))} of {len(expected)} digests equal")
            if found != expected:
                sys.exit("the digests differ")
    if options.only != "digests":
        pytest = [python, "-m", "pytest", "--backends", "numpy", "-p", "no:cacheprovider", "-rs"]
        # Hypothesis's own profile for slow machines: examples have no time limit.
        pytest.append("--hypothesis-profile=ci")
        for name, reason in UNFIT.items():
            print(f"left out, {reason}: {name}")
            pytest.append(f"--deselect={name}")
        os.chdir(ROOT)
        chosen = any((ROOT / word.partition("::")[0]).exists() for word in given)
        run(*pytest, *given, *([] if chosen else TESTS), NUMBA_CPU_NAME="generic", **environment)


if __name__ == "__main__":
    main()

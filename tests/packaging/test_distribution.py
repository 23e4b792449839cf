"""What the wheel holds, and that it works where only its own dependencies are."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from corequant.recipe import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (found,) = folder.glob("*.whl")
    return found


def test_contents(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {
        "corequant",
        "corequant_torch",
        "corequant_transformers",
        "corequant_vllm",
        "corequant_cli",
    }
    others = {n for n in names if ".dist-info" not in n and not n.endswith((".py", "/py.typed"))}
    # The conformance suite's golden vectors: arrays without pickles, and their checksums.
    golden = {"corequant/golden/manifest.json", "corequant/golden/vectors.npz"}
    presets = {f"corequant/recipe/presets/{name}.toml" for name in PRESETS}
    # What is calibrated on where no data is given.
    assert others == golden | presets | {"corequant_transformers/calibration/data/carried.jsonl"}
    for package in tops:
        assert f"{package}/py.typed" in names
    shipped = {n for n in names if n.endswith(".py")}
    sources = {
        path.relative_to(base).as_posix()
        for base, package in (
            (ROOT, "corequant"),
            (ROOT / "backends", "corequant_torch"),
            (ROOT / "adapters", "corequant_transformers"),
            (ROOT / "adapters", "corequant_vllm"),
            (ROOT / "adapters", "corequant_cli"),
        )
        for path in (base / package).rglob("*.py")
    }
    assert shipped == sources


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)

    def read(end):
        return archive.read(next(n for n in archive.namelist() if n.endswith(end))).decode()

    metadata = read("METADATA")
    required = {
        line.split(": ")[1].split(">")[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert required == {"llvmlite", "numba", "numpy", "scipy"}
    entries = read("entry_points.txt")
    assert "torch = corequant_torch:TorchBackend" in entries
    assert "corequant = corequant.cli:main" in entries


def test_fresh_environment_without_frameworks(wheel, tmp_path):
    """Install the wheel alone, its dependencies in an environment that has no torch."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel],
        check=True,
        capture_output=True,
    )
    code = (
        "import numpy as np, corequant as cq\n"
        "x = np.random.default_rng(0).normal(size=(4, 96)).astype('f4')\n"
        "p = cq.massdiff(cq.ActivationStats(96).update(x).mean_abs, 16)\n"
        "q = cq.quantize(cq.block_hadamard(x[:, p], 16), 'int4:token:asymmetric')\n"
        "assert q.codes.shape == x.shape\n"
        "try:\n"
        "    from corequant._dispatch import get_backend; get_backend('torch')\n"
        "except cq.BackendError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "corequant[torch]"' in done.stdout
    command = subprocess.run(
        [tmp_path / "env" / "bin" / "corequant", "backends"], capture_output=True, text=True
    )
    assert command.returncode == 1
    assert 'pip install "corequant[transformers]"' in command.stderr

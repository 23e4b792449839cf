"""The backend of docs/: registered from outside as a package would, and passing the suite."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import array_api_strict as xp
import numpy as np
import pytest

import corequant as cq
from corequant import _dispatch, testing

DOCS = Path(__file__).parents[2] / "docs"
NAME = "array_api_strict"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Make what ``pip install`` leaves of a package with an entry point; return its folder."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "array_api_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: array-api-backend\nVersion: 1.0\n")
    page = (DOCS / "third-party-backends.md").read_text(encoding="utf-8")
    (entry,) = [line for line in page.splitlines() if line.startswith(f"{NAME} = ")]
    (info / "entry_points.txt").write_text(f"[corequant.backends]\n{entry.replace(chr(34), '')}\n")
    (folder / "array_api_backend.py").write_bytes((DOCS / "array_api_backend.py").read_bytes())
    return folder


@pytest.fixture
def registered(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    caches = (_dispatch.get_backend, _dispatch.owner_of)
    for found in caches:
        found.cache_clear()
    yield
    for found in caches:
        found.cache_clear()
    sys.modules.pop("array_api_backend", None)


@pytest.mark.parametrize("check", testing.checks(), ids=lambda check: check.name)
def test_it_passes(check, registered):
    check.run(testing.find_target(NAME))


def test_the_command_finds_it(site):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "corequant.testing", "--backend", NAME, "--quiet"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    count = len(testing.checks())
    assert done.stdout == f"{NAME}: {count} of {count} checks passed\n", done.stdout + done.stderr
    assert done.returncode == 0


def test_public_functions_take_its_arrays(registered):
    assert cq.available_backends() == ("numpy", NAME, "torch")
    array = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    x = xp.asarray(array)
    y = cq.block_hadamard(x, 16)
    assert type(y) is type(x)
    np.testing.assert_allclose(np.asarray(y), cq.block_hadamard(array, 16), atol=1e-6)
    for text in testing.GOLDEN_SPECS:
        found, expected = cq.quantize(x, text), cq.quantize(array, text)
        np.testing.assert_array_equal(np.asarray(found.codes), expected.codes)
        np.testing.assert_array_equal(np.asarray(cq.dequantize(found)), cq.dequantize(expected))
    rotated = cq.rotate_quantize(x, 16, "mxfp4")
    assert type(rotated.codes) is type(x)
    statistics = cq.ActivationStats(64, gram=True).update(x)
    np.testing.assert_allclose(
        statistics.gram, cq.ActivationStats(64, gram=True).update(array).gram, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(cq.NonFiniteError, match=r"index \(0, 1\)"):
        cq.quantize(xp.asarray([[1.0, float("nan")]]), "int4:token")
    with pytest.raises(TypeError, match="real floating dtype"):
        cq.block_hadamard(xp.asarray([[1, 2]]), 2)
    with pytest.raises(cq.BackendError, match="has absmax scales"):
        cq.quantize(x, "int4:token:mse")
    with pytest.raises(cq.BackendError, match="must have a backend with round_columns"):
        cq.gptq(x, xp.asarray(np.eye(64)), "int4:channel")


def test_it_is_unknown_unless_registered():
    assert importlib.util.find_spec("array_api_backend") is None
    with pytest.raises(TypeError, match=r"torch, got array_api_strict\._array_object"):
        cq.block_hadamard(xp.ones((1, 4)), 4)

"""The public conformance suite itself: it passes for our backends, and it can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import corequant as cq
from corequant import testing

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", metafunc.config.getoption("--backends").split(","))


@pytest.mark.parametrize("check", testing.checks(), ids=lambda check: check.name)
def test_backends_pass(check, name):
    check.run(testing.find_target(name))


def test_the_report(capsys, name):
    assert testing.main(["--backend", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(testing.checks()) + 1
    assert lines[-1] == f"{name}: {len(lines) - 1} of {len(lines) - 1} checks passed"


class Wrong:
    """NumPy's backend with one fault."""

    def __init__(self, fault):
        self.numpy, self.fault = testing.find_target("numpy").backend, fault

    def __getattr__(self, name):
        true = getattr(self.numpy, name)
        if name != self.fault:
            return true

        def wrong(*arguments, **options):
            result = true(*arguments, **options)
            first = np.array(result[0] if isinstance(result, tuple) else result)
            first.flat[0] += 1
            return (first, *result[1:]) if isinstance(result, tuple) else first

        return wrong


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("quantize", "golden mxfp4"),
        ("dequantize", "golden int4:token:asymmetric"),
        ("fake_quantize", "golden nvfp4"),
        ("choose_global_scale", "golden nvfp4"),
        ("encode", "decode and encode int4"),
        ("decode", "decode and encode int4"),
        ("block_hadamard", "rotation by 16"),
        ("moments", "statistics"),
        ("add_gram", "statistics"),
        ("token_normalize", "statistics"),
    ],
)
def test_faults_are_found(fault, check):
    target = testing.Target(Wrong(fault), np.asarray, np.asarray)
    found = {c.name: c for c in testing.checks()}[check]
    with pytest.raises(AssertionError):
        found.run(target)


def test_an_absent_backend_is_an_error():
    with pytest.raises(cq.BackendError, match="no backend"):
        testing.main(["--backend", "nowhere"])


@pytest.mark.torch
def test_cuda_without_a_gpu_is_an_error():
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(cq.BackendError, match="no usable GPU or driver"):
            testing.main(["--backend", "cuda"])


def test_golden_vectors_are_what_the_generator_writes():
    import generate_vectors

    stored = testing.golden_vectors()
    made = generate_vectors.vectors()
    assert set(stored) == set(made)
    for name, array in made.items():
        np.testing.assert_array_equal(stored[name], array)
        assert stored[name].dtype == array.dtype

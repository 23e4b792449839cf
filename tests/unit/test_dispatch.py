from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import torch

import corequant as cq
from corequant._dispatch import backend_for, get_backend
from corequant.protocols import Backend


def test_installed_backends():
    assert cq.available_backends() == ("numpy", "torch")


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_backends_fulfil_the_protocol(name):
    backend = get_backend(name)
    assert isinstance(backend, Backend)
    assert backend.name == name
    assert backend.describe()


def test_the_arrays_type_decides():
    assert backend_for(x=np.ones(2)).name == "numpy"
    assert backend_for(x=torch.ones(2), y=None).name == "torch"
    assert backend_for(x=torch.nn.Parameter(torch.ones(2))).name == "torch"


def test_mixed_and_foreign_arrays_are_refused():
    with pytest.raises(TypeError, match="x belongs to numpy, out belongs to torch"):
        backend_for(x=np.ones(2), out=torch.ones(2))
    with pytest.raises(TypeError, match=r"numpy, torch, got builtins\.list"):
        backend_for(x=[1.0])


def test_an_unknown_backend_says_what_is_there():
    with pytest.raises(cq.BackendError, match="installed are: numpy, torch"):
        get_backend("jax")


def test_a_backend_that_cant_be_imported_says_how_to_get_it(monkeypatch):
    class Broken:
        name = "torch"

        def load(self):
            raise ImportError("No module named 'torch'")

    get_backend.cache_clear()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Broken()])
    with pytest.raises(cq.BackendError, match=r'pip install "corequant\[torch\]"'):
        get_backend("torch")
    get_backend.cache_clear()

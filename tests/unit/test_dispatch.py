from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np
import pytest
import torch

import corequant as cq
from corequant._dispatch import backend_for, get_backend, owner_of
from corequant.protocols import RegisteredBackend


def test_installed_backends():
    assert cq.available_backends() == ("numpy", "torch")


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_backends_fulfil_the_protocol(name):
    backend = get_backend(name)
    assert isinstance(backend, RegisteredBackend)
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


@pytest.fixture
def nothing_registered(monkeypatch):
    """As where the source tree is on the path and no distribution is installed."""
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    for cached in (get_backend, owner_of):
        cached.cache_clear()
    yield
    for cached in (get_backend, owner_of):
        cached.cache_clear()


@pytest.mark.usefixtures("nothing_registered")
def test_a_source_tree_on_the_path_finds_its_own_backend():
    assert cq.available_backends() == ("numpy", "torch")
    x = torch.arange(8.0)
    np.testing.assert_array_equal(cq.block_hadamard(x, 4), cq.block_hadamard(x.numpy(), 4))


@pytest.mark.usefixtures("nothing_registered")
def test_a_backend_that_is_not_there_is_not_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cq.available_backends() == ("numpy",)
    with pytest.raises(cq.BackendError, match="installed are: numpy$"):
        get_backend("torch")

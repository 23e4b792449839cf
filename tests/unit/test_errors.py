from __future__ import annotations

import copy
import pickle

import pytest

import corequant as cq
from corequant import errors


def test_every_error_is_a_corequant_error():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), cq.CorequantError)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ShapeError", ValueError),
        ("BlockSizeError", ValueError),
        ("HadamardOrderError", ValueError),
        ("PermutationError", ValueError),
        ("NonFiniteError", ValueError),
        ("BackendError", RuntimeError),
        ("CheckpointError", OSError),
        ("OutputError", OSError),
    ],
)
def test_errors_are_also_of_pythons_own_kind(name, builtin):
    assert issubclass(getattr(cq, name), builtin)


def test_non_finite_error_tells_where():
    error = cq.NonFiniteError("x", 2, (1, 3), float("nan"))
    assert (error.name, error.count, error.index) == ("x", 2, (1, 3))
    assert "x must be finite" in str(error)
    assert "(1, 3)" in str(error)


def pickled(error):
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_errors_come_back_from_other_processes(again):
    error = cq.NonFiniteError("x", 2, (1, 3), float("inf"))
    back = again(error)
    assert type(back) is cq.NonFiniteError
    assert str(back) == str(error)
    assert (back.name, back.count, back.index, back.value) == ("x", 2, (1, 3), float("inf"))

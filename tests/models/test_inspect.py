from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

import corequant as cq
import corequant_transformers as cqhf
from corequant_cli.app import run as command
from corequant_transformers.inspection import html
from tests.models.test_cli import folder, run  # noqa: F401


@pytest.fixture(scope="module")
def found():
    tokens = np.random.default_rng(0).integers(0, 128, (4, 64))
    return cqhf.inspect(cqhf.tiny_model("llama"), tokens, 16)


def test_measures(found):
    assert [layer.name for layer in found.layers] == [
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    ]
    assert found.block_sizes == (16, 32)
    for layer in found.layers:
        assert 1 / 96 <= layer.concentration <= 1
        assert layer.ranges["permuted"] == pytest.approx(1, rel=1e-6)
        bounds = layer.bounds
        assert bounds["lower"] <= bounds["truth"] <= bounds["upper"]
        assert bounds["truth"] <= bounds["probable"]
        assert all(b >= 1 for b in layer.balance.values())
        assert len(layer.recovery["massdiff"]) == 2
        assert len(layer.magnitudes) == 96


def test_report_is_one_file_that_needs_no_other(found, tmp_path):
    page = cqhf.write_report(found, tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)='(?!data:)", page)
    assert "model.layers.1.mlp.down_proj" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html"]


def test_report_that_cant_be_made(found, tmp_path, monkeypatch):
    with pytest.raises(cq.OutputError, match="can't be written"):
        cqhf.write_report(found, tmp_path / "none" / "r.html")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(cq.BackendError, match=r'pip install "corequant\[plot\]"'):
        cqhf.write_report(found, tmp_path / "r.html")


@pytest.mark.parametrize(("name", "axis"), [("_ranges", "x"), ("_bounds", "x"), ("_channels", "y")])
def test_layers_are_whole_numbers(name, axis, found):
    axes = getattr(html, name)(found).axes[0]
    ticks = axes.get_xticks() if axis == "x" else axes.get_yticks()
    assert len(ticks) > 1
    assert not np.mod(ticks, 1).any()


def test_too_few_windows():
    with pytest.raises(cq.CalibrationError, match="at least 2 windows"):
        cqhf.inspect(cqhf.tiny_model("llama"), np.ones((1, 8), int))


def test_command(folder, tmp_path):  # noqa: F811
    done = run(
        "inspect", "model", "--text", "text.txt", "--sequence-length", "64", "--block-size", "16",
        "--report", tmp_path / "r.html", "--json", cwd=folder,
    )  # fmt: skip
    assert len(json.loads(done.stdout)["layers"]) == 2
    assert (tmp_path / "r.html").is_file()


def test_the_command_looks_for_matplotlib_before_any_work(folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["corequant", "inspect", "model", "--text", "text.txt"])
    monkeypatch.setattr(cqhf.Source, "load", lambda source: pytest.fail("the model was loaded"))
    assert command() == 1
    assert 'pip install "corequant[plot]"' in capsys.readouterr().err

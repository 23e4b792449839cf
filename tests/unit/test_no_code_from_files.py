"""Nothing that any of the packages reads can run: proved on their syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "corequant",
    "backends/corequant_torch",
    "adapters/corequant_transformers",
    "adapters/corequant_vllm",
    "adapters/corequant_cli",
)
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"torch.load", "torch.hub.load"}
PICKLE_FREE = {"numpy.load", "np.load"}
"""Safe where they are told so in words."""


def violations(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            told = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            if name in CALLS or name in LOADERS or (name in PICKLE_FREE and not told):
                found.append(name)
            for keyword in node.keywords:
                risky = keyword.arg in ("trust_remote_code", "allow_pickle")
                if risky and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    found.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_no_pickle_eval_exec_or_remote_code(file):
    assert violations(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "exec(x)",
        "torch.load(p)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "f(trust_remote_code=x)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert violations(source)

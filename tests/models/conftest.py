"""The tiny models of every architecture, and the real one from PyPI."""

from __future__ import annotations

import numpy as np
import pytest

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 128, (3, 48))

"""Where a float model's outliers sit, and what permutations and rotations do to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant.calibration import ActivationStats
from corequant.diagnostics import (
    block_mass,
    load_balance,
    mass_concentration,
    outlier_bounds,
    probable_outlier_bounds,
)
from corequant.errors import CalibrationError
from corequant.permutation import energydiff, identity_permutation, massdiff
from corequant.quantization import fake_quantize
from corequant.recipe import Recipe
from corequant.rotation import block_hadamard
from corequant.selection import rotation_error
from corequant_transformers.model.forward import check_tokens
from corequant_transformers.model.replicas import unwrap
from corequant_transformers.model.surroundings import undisturbed
from corequant_transformers.pipeline import calibrate, plan_for

__all__ = ["Inspection", "LayerInspection", "inspect"]

PROBABILITY = 0.05


@dataclass(frozen=True)
class LayerInspection:
    """Measures of one layer's input on tokens that chose nothing.

    Attributes
    ----------
    name : str
    concentration : float
        Median over tokens of δ; 1/√d and below guarantees that a full rotation helps.
    guaranteed : float
        Share of tokens with δ ≤ 1/√d.
    ranges : dict of str to float
        Mean of max - min over tokens, relative to the identity's: rotated by blocks, permuted,
        both, and rotated in full.
    bounds : dict of str to float
        Means over tokens of lower bound, truth, probable bound and upper bound of the largest
        magnitude after permutation and block rotation.
    balance : dict of str to float
        Heaviest block's energy over the least possible, by permutation.
    recovery : dict of str to list of float
        Error of the full rotation over that of the block rotation, a value for each block size, by
        permutation; above 1 the blocks are better.
    magnitudes : list of float
        Mean |x| of each channel.
    outlier : float
        The largest of these over their median.
    block_mass : dict of str to float
        Heaviest block's mean |x| over that of all blocks, by permutation.
    errors : dict of str to float
        Mean over tokens of ‖Q(z) - z‖² / ‖z‖² of the rounded input: unrotated, rotated by blocks
        as it is, after each permutation, and rotated in full.
    """

    name: str
    concentration: float
    guaranteed: float
    ranges: dict[str, float]
    bounds: dict[str, float]
    balance: dict[str, float]
    recovery: dict[str, list[float]]
    magnitudes: list[float] = field(repr=False)
    outlier: float
    block_mass: dict[str, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class Inspection:
    """Result of ``inspect``.

    Attributes
    ----------
    model_type : str
    name : str
        Name of the model: what its config says that it was loaded from, or its type.
    block_size : int
        Block length of ranges, bounds and balance.
    block_sizes : tuple of int
        Block lengths of the recovery.
    activations : str
        Quantizer of the activations.
    layers : tuple of LayerInspection
        Without experts that no token reached.
    """

    model_type: str
    name: str
    block_size: int
    block_sizes: tuple[int, ...]
    activations: str
    layers: tuple[LayerInspection, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@undisturbed()
def inspect(
    model: Any,
    tokens: npt.NDArray[np.int64],
    block_size: int = 16,
    *,
    activations: str = "int4:token:asymmetric",
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Inspection:
    """Measure what the rotated layers of a float model read.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Float, untransformed. It is only read.
    tokens : numpy.ndarray (windows, length), int64
        The last window judges, the others choose; at least two.
    block_size : int
        For ranges, bounds and balance.
    activations : str
        The quantizer whose error is measured.
    progress : callable

    Returns
    -------
    Inspection

    Raises
    ------
    ArchitectureError, BlockSizeError, HadamardOrderError
        If the model is unknown, or the block size doesn't fit it.
    BackendError, CheckpointError
        If weights of the model are not in memory, or are those of a quantizer.
    CalibrationError
        If there are too few tokens, or ids that the model has no row for.

    Examples
    --------
    >>> import numpy as np, corequant_transformers as cqhf
    >>> found = cqhf.inspect(cqhf.tiny_model("llama"), np.arange(128).reshape(4, 32), 16)
    >>> len(found.layers), found.block_sizes
    (2, (16, 32))
    """
    windows = check_tokens(tokens)
    if len(windows) < 2:
        raise CalibrationError(f"inspecting needs at least 2 windows, got {len(windows)}")
    recipe = Recipe(
        block_size=block_size, permutation="auto", rare_experts="nearest", expert_tokens=1
    )
    data = calibrate(model, recipe, windows, progress=progress)
    plan = plan_for(unwrap(model), recipe)
    widths = {m.shape[1] for m in plan.mlp_outputs}
    sizes = tuple(b for b in (16, 32, 64, 128, 256) if all(w % b == 0 and b < w for w in widths))
    layers = []
    for done, matrix in enumerate(plan.mlp_outputs):
        statistics, held_out = data.statistics[matrix.name], data.held_out[matrix.name]
        if statistics.count:
            # Experts that the last window's tokens pass by are judged by those that they saw.
            x = (held_out if held_out.count else statistics).tokens
            layers.append(_layer(matrix.name, statistics, x, block_size, sizes, activations))
        progress("inspect", done + 1, len(plan.mlp_outputs))
    kind = plan.architecture.model_type
    name = Path(str(getattr(unwrap(model).config, "name_or_path", ""))).name or kind
    return Inspection(kind, name, block_size, sizes, activations, tuple(layers))


def _layer(
    name: str,
    statistics: ActivationStats,
    x: npt.NDArray[np.float32],
    block_size: int,
    sizes: tuple[int, ...],
    activations: str,
) -> LayerInspection:
    d, mean = statistics.d, statistics.mean_abs
    choose: dict[str, Callable[[int], npt.NDArray[np.int64]]] = {
        "identity": lambda b: identity_permutation(d),
        "massdiff": lambda b: massdiff(statistics.mean_abs, b),
        "energydiff": lambda b: energydiff(statistics.energy_gram, b),
    }
    delta = mass_concentration(x)
    p = choose["energydiff"](block_size)
    rotated = {
        "rotated": block_hadamard(x, block_size),
        "permuted": x[:, p],
        "permuted and rotated": block_hadamard(x[:, p], block_size),
        "full rotation": block_hadamard(x),
    }
    plain = np.ptp(x, axis=1).mean()
    lower, upper = outlier_bounds(x[:, p], block_size)
    _, probable = probable_outlier_bounds(x[:, p], block_size, PROBABILITY)
    truth = np.abs(rotated["permuted and rotated"]).max(1)
    full = rotation_error(x, None, activations)
    recovery = {
        method: [
            full / rotation_error(x, b, activations, permutation=make(b)) if full else 1.0
            for b in sizes
        ]
        for method, make in choose.items()
    }
    return LayerInspection(
        name,
        float(np.median(delta)),
        float((delta <= 1 / np.sqrt(d)).mean()),
        {k: float(np.ptp(v, axis=1).mean() / plain) if plain else 1.0 for k, v in rotated.items()},
        {
            "lower": float(lower.mean()),
            "truth": float(truth.mean()),
            "probable": float(probable.mean()),
            "upper": float(upper.mean()),
        },
        {
            method: load_balance(statistics.mean_energy[make(block_size)], block_size)
            for method, make in choose.items()
        },
        recovery,
        mean.tolist(),
        float(mean.max() / max(float(np.median(mean)), 1e-30)),
        {method: _heaviest(mean[make(block_size)], block_size) for method, make in choose.items()},
        {
            "unrotated": _error(x, activations),
            "rotated": rotation_error(x, block_size, activations),
            **{
                method: rotation_error(x, block_size, activations, permutation=make(block_size))
                for method, make in choose.items()
                if method != "identity"
            },
            "full rotation": full,
        },
    )


def _heaviest(mass: npt.NDArray[Any], block_size: int) -> float:
    blocks = block_mass(mass, block_size)
    return float(blocks.max() / blocks.mean()) if blocks.any() else 1.0


def _error(x: npt.NDArray[np.float32], activations: str) -> float:
    """Return what ``rotation_error`` is of tokens that aren't rotated."""
    wrong = np.square(fake_quantize(x, activations) - x, dtype=np.float64).sum(1)
    power = np.square(x, dtype=np.float64).sum(1)
    return float(np.divide(wrong, power, out=np.zeros_like(power), where=power > 0).mean())

"""Inspections in words: which layers hurt, why, and the options that help."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from corequant_transformers.inspection.layers import LayerError, LayerErrors
from corequant_transformers.inspection.outliers import Inspection, LayerInspection

__all__ = ["Advice", "layer_advice", "megabytes", "outlier_advice"]

_WORST = 3


@dataclass(frozen=True)
class Advice:
    """Conclusions of an inspection.

    Attributes
    ----------
    summary : str
        One sentence or two.
    reasons : tuple of str
        About each of the layers that hurt most, the worst first.
    options : tuple of (str, str)
        Options of ``corequant quantize``, quoted for a shell, and what each does.
    """

    summary: str
    reasons: tuple[str, ...]
    options: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def outlier_advice(found: Inspection) -> Advice:
    """Describe which layers of a float model hurt, why, and which options help.

    Parameters
    ----------
    found : Inspection

    Returns
    -------
    Advice

    Examples
    --------
    >>> import numpy as np, corequant_transformers as cqhf
    >>> from corequant_transformers.inspection.words import outlier_advice
    >>> found = cqhf.inspect(cqhf.tiny_model("llama"), np.arange(128).reshape(4, 32), 16)
    >>> outlier_advice(found).options[-1][0]
    '--activations none'
    """
    plain = _mean(found, "unrotated")
    choices = _choices(found.block_size)
    best = min(choices, key=lambda name: _mean(found, name))
    worst = sorted(found.layers, key=lambda layer: -layer.errors["unrotated"])[:_WORST]
    summary = (
        f"Rounded to {found.activations} without transforms, the inputs of {len(found.layers)} "
        f"layers have a relative error of {plain:.1%}; the largest are those of:"
    )
    after = _mean(found, best)
    options = [(choices[best], f"error {after:.1%}, the least of all options tried")]
    left = sorted(found.layers, key=lambda layer: -layer.errors[best])[:_WORST]
    middle = float(np.median([layer.errors[best] for layer in found.layers]))
    for layer in left:
        # Twice the error, in magnitude.
        if layer.errors[best] > 4 * middle:
            rule = shlex.quote(f"{layer.name}=activations=int8")
            error = np.sqrt(layer.errors[best])
            options.append((f"--layer {rule}", f"its error is still {error:.1%} then"))
    options.append(("--activations none", "inputs stay in float, and none of this matters"))
    return Advice(summary, tuple(_outlier_reason(layer, found) for layer in worst), tuple(options))


def _choices(block_size: int) -> dict[str, str]:
    """Return the options that lead to each of an inspection's errors."""
    blocks = f"--rotation merged --block-size {block_size} --permutation"
    return {
        "unrotated": "--rotation offline",
        "rotated": f"{blocks} identity",
        "massdiff": f"{blocks} massdiff",
        "energydiff": f"{blocks} energydiff",
        "full rotation": "--rotation merged",
    }


def _mean(found: Inspection, name: str) -> float:
    """Return the geometric mean over layers of an error's magnitude."""
    errors = np.array([layer.errors[name] for layer in found.layers])
    return float(np.exp(np.log(np.maximum(errors, 1e-24)).mean() / 2))


def _outlier_reason(layer: LayerInspection, found: Inspection) -> str:
    width = len(layer.magnitudes)
    limit = 1 / np.sqrt(width)
    sign, spread = ">", "so a full rotation may even enlarge its largest number"
    if layer.concentration <= limit:
        sign, spread = "≤", "so a full rotation can't enlarge its largest number"
    return (
        f"{layer.name}: error {np.sqrt(layer.errors['unrotated']):.1%}. Its largest channel is "
        f"{layer.outlier:.3g} times the median one; δ of a token is {layer.concentration:.3f} "
        f"{sign} 1/√{width} = {limit:.3f}, {spread}. Its heaviest block of {found.block_size} has "
        f"{layer.block_mass['identity']:.2f} times the mean mass, permuted "
        f"{layer.block_mass['energydiff']:.2f} times. A token's range is "
        f"{layer.ranges['rotated']:.2f} of what it was after rotating blocks, "
        f"{layer.ranges['permuted and rotated']:.2f} after permuting and rotating, "
        f"{layer.ranges['full rotation']:.2f} after a full rotation."
    )


def layer_advice(found: LayerErrors) -> Advice:
    """Describe which layers of a quantized model hurt, why, and which options help.

    Parameters
    ----------
    found : LayerErrors

    Returns
    -------
    Advice
    """
    total = sum(layer.kl for layer in found.layers)
    worst = [found.layer(name) for name in found.worth_keeping]
    error = "" if found.kl_se is None else f" ±{found.kl_se:.2g}"
    summary = (
        f"KL from the float model is {found.kl:.4f}{error} nats per token, over {found.windows} "
        f"windows of {found.sequence_length} tokens. Quantized alone, these layers add the most:"
    )
    reasons = tuple(_layer_reason(layer, total) for layer in worst)
    names = " ".join(f"--keep {shlex.quote(layer.name)}" for layer in worst)
    size = sum(layer.kept_bytes for layer in worst)
    options = [(names, f"{megabytes(size)}; KL {found.kl_kept:.4f} with only these in float")]
    options += [
        (f"--layer {shlex.quote(layer.wider)}", megabytes(layer.wider_bytes))
        for layer in worst
        if layer.wider is not None
    ]
    return Advice(summary, reasons, tuple(options))


def _layer_reason(layer: LayerError, total: float) -> str:
    share = layer.kl / total if total else 0.0
    text = (
        f"{layer.name}: KL {layer.kl:.4f}, {share:.0%} of the sum over layers. Its outputs have a "
        f"relative error of {layer.output_error:.1%}"
    )
    weight = f"its weight ({layer.weights}, {layer.weights_clipped:.2%} clipped)"
    if layer.activations is None:
        return f"{text}, from {weight}."
    delta = "" if layer.concentration is None else f", δ {layer.concentration:.3f}"
    given = f"its input ({layer.activations}, {layer.activations_clipped or 0:.2%} clipped{delta})"
    return (
        f"{text}: {layer.weight_share:.0%} of the squared error from {weight}, "
        f"{1 - layer.weight_share:.0%} from {given}."
    )


def megabytes(count: int) -> str:
    """Return a difference in bytes as signed megabytes.

    Examples
    --------
    >>> from corequant_transformers.inspection.words import megabytes
    >>> megabytes(1_250_000), megabytes(-3_000)
    ('+1.25 MB', '-0.003 MB')
    """
    return f"{count / 1e6:+.3g} MB"

"""The effect of each quantized layer alone, and the cost of keeping it in float."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import CheckpointError
from corequant.formats import FormatKind
from corequant.specs import Granularity, QuantSpec, ScaleFormat
from corequant_transformers.checkpoint.quantized import Quantized
from corequant_transformers.checkpoint.reader import load, read_plan
from corequant_transformers.checkpoint.reports import read_report
from corequant_transformers.evaluation.measurement import (
    check_vocabulary,
    reference_model,
    replica_of,
)
from corequant_transformers.evaluation.statistics import mean_with_error
from corequant_transformers.files.hub import locate
from corequant_transformers.inspection.exchanges import Tally, exchange, float_forward
from corequant_transformers.inspection.matching import check_alike, find_choices, transformed
from corequant_transformers.inspection.passes import Passes, exchanged
from corequant_transformers.model.forward import check_positions, check_tokens
from corequant_transformers.model.layouts import check_blocks, check_places
from corequant_transformers.model.replicas import check_given
from corequant_transformers.model.surroundings import device_of, undisturbed
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan, plan_model

__all__ = ["LayerError", "LayerErrors", "layer_errors"]


@dataclass(frozen=True)
class LayerError:
    """The effect of quantizing one layer alone.

    Attributes
    ----------
    name : str
        The layer's path; for all experts of a block together, a pattern that rules for layers take.
    layers : tuple of str
        The paths that it stands for.
    weights : str
        Quantizer of the weight.
    activations : str or None
        Quantizer of the input.
    tokens : tuple of int
        How many tokens reached it, for each of ``layers``.
    kl, kl_se : float
        Mean over tokens of KL(float || float with this layer quantized), in nats, and its standard
        error over windows.
    output_error : float
        Error of its outputs on what it reads in the float model: ‖y' - y‖ / ‖y‖ over all tokens.
    weight_share : float
        Share of the squared error that rounding the weight alone makes, of what weight and input
        make, each alone.
    weight_error : float
        ‖W' - W‖ / ‖W‖ of the weight.
    weights_clipped : float
        Share of the float weights that their grid clips: further than half a step beyond its ends.
    activations_clipped : float or None
        The same of its inputs.
    concentration : float or None
        Median over tokens of δ of what its quantizer of activations reads.
    kept_bytes : int
        Bytes that the result grows by if it is kept in float.
    wider : str or None
        A rule that gives its weight 8 bits; None if it has as many.
    wider_bytes : int
        Bytes that the result grows by then.
    """

    name: str
    layers: tuple[str, ...]
    weights: str
    activations: str | None
    tokens: tuple[int, ...]
    kl: float
    kl_se: float | None
    output_error: float
    weight_share: float
    weight_error: float
    weights_clipped: float
    activations_clipped: float | None
    concentration: float | None
    kept_bytes: int
    wider: str | None
    wider_bytes: int


@dataclass(frozen=True)
class LayerErrors:
    """Result of ``layer_errors``.

    Attributes
    ----------
    windows, sequence_length : int
    kl, kl_se : float
        KL divergence of the whole quantized model and its standard error.
    layers : tuple of LayerError
        In the order of the model.
    worth_keeping : tuple of str
        The names of those with the largest divergence alone, the worst first.
    kl_kept : float
        Divergence of the quantized model with these in float, and nothing rounded again.
    """

    windows: int
    sequence_length: int
    kl: float
    kl_se: float | None
    layers: tuple[LayerError, ...]
    worth_keeping: tuple[str, ...]
    kl_kept: float

    def layer(self, name: str) -> LayerError:
        """Return the layer of a name."""
        return next(layer for layer in self.layers if layer.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@undisturbed()
def layer_errors(
    quantized: str | Path | Quantized,
    against: Any,
    tokens: npt.NDArray[np.int64],
    *,
    keep: int = 3,
    verify: bool = True,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> LayerErrors:
    """Measure the effect of each quantized layer alone on the float model's predictions.

    The float model is transformed as the quantized one was, which leaves its function as it is, and
    one layer at a time is exchanged for the quantized one, with its quantizer of activations. This
    tells the layers apart by their own harm: in the quantized model, methods such as Qronos have
    later layers make up for earlier ones, which layers that are kept would not need.

    Parameters
    ----------
    quantized : str, Path or Quantized
        A directory that ``quantize`` wrote, or what it returned.
    against : transformers.PreTrainedModel or str or Path
        The float model that it was made from, or where it is.
    tokens : numpy.ndarray (windows, length), int64
        A few hundred tokens are enough to tell which layers hurt. Each layer costs a pass from its
        block on; the experts of a block count as one layer for each kind of projection.
    keep : int
        Number of layers to name as worth keeping.
    verify : bool
        Compare a directory's files with their digests.
    progress : callable
        Called as ``progress(phase, done, total)``.

    Returns
    -------
    LayerErrors

    Raises
    ------
    ArchitectureError, BackendError
        If the float model can't be read.
    CalibrationError
        If token windows have a wrong shape or ids that the model has no row for.
    CheckpointError
        If there is no such model, or the float model isn't the one that was quantized.
    NonFiniteError
        If logits hold NaN or infinity.

    Examples
    --------
    >>> import numpy as np, corequant_transformers as cqhf
    >>> from corequant.recipe import Recipe
    >>> model, tokens = cqhf.tiny_model("llama"), np.arange(64).reshape(2, 32)
    >>> made = cqhf.quantize(model, Recipe(block_size=16), tokens)
    >>> found = cqhf.layer_errors(made, model, tokens, keep=2)
    >>> len(found.layers), len(found.worth_keeping), found.kl_kept < found.kl
    (14, 2, True)
    """
    keep = check_index("keep", keep)
    windows = check_tokens(tokens)
    plan, own, draw, where = _opened(quantized, verify)
    model = check_given(reference_model(against, device_of(own)))
    _check_same_model(plan, model, windows, where)
    reference = transformed(model, plan, find_choices(plan, own, model, draw))
    check_alike(plan, own, reference, where)
    passes = Passes(
        reference, plan, windows, lambda done, total: progress("float model", done, total)
    )
    whole = passes.divergence_of(own)
    layers = []
    groups = _groups(plan)
    for done, (name, rows) in enumerate(groups.items()):
        layers.append(_measured(name, rows, plan, own, reference, passes))
        progress("layers", done + 1, len(groups))
    worst = sorted(layers, key=lambda layer: -layer.kl)[:keep]
    kept = {path: float_forward(own, reference, path) for each in worst for path in each.layers}
    with exchanged(own, kept):
        rest = passes.divergence_of(own)
    names = tuple(layer.name for layer in worst)
    shape = (int(windows.shape[0]), int(windows.shape[1]))
    return LayerErrors(
        *shape, *mean_with_error(whole), tuple(layers), names, mean_with_error(rest)[0]
    )


def _opened(quantized: str | Path | Quantized, verify: bool) -> tuple[ModelPlan, Any, int, str]:
    """Return the plan, the model to run, the draw of its signs, and its name."""
    if isinstance(quantized, Quantized):
        report, plan, model = quantized.report, quantized.plan, quantized.model
        where = "what quantize returned"
    else:
        folder = locate(quantized)
        model = load(folder, verify=verify)
        report, (plan, _), where = read_report(folder), read_plan(folder), str(folder)
    signs = report.get("signs", {})
    draw = signs.get("draw", 0) if isinstance(signs, dict) else None
    if isinstance(draw, bool) or not isinstance(draw, int) or draw < 0:
        raise CheckpointError(
            f"signs.draw in the report of {where} must be an index, got {str(draw)[:40]!r}"
        )
    return plan, replica_of(model), draw, where


def _check_same_model(
    plan: ModelPlan, model: Any, tokens: npt.NDArray[np.int64], where: str
) -> None:
    """Raise unless a float model has the matrices of a plan, and can read tokens."""
    theirs = {
        m.name: m.shape for m in plan_model(model.config, plan.recipe, plan.architecture).matrices
    }
    for matrix in plan.matrices:
        found = theirs.get(matrix.name)
        if found != matrix.shape:
            got = "none" if found is None else f"one of {found}"
            raise CheckpointError(
                f"against must be the float model that {where} was made from, with a matrix "
                f"{matrix.name} of {matrix.shape}, got {got}"
            )
    check_places(model, plan.architecture)
    check_blocks(model, plan.architecture, plan.dimensions.blocks)
    check_positions(plan.architecture, plan.dimensions, tokens)
    check_vocabulary(model, tokens)


def _groups(plan: ModelPlan) -> dict[str, list[MatrixPlan]]:
    """Return the rows that are exchanged together, by the name of the layer or its pattern."""
    groups: dict[str, list[MatrixPlan]] = {}
    for matrix in plan.quantized:
        name = matrix.name
        experts = plan.architecture.experts
        if matrix.expert is not None and experts is not None:
            head, _, tail = name.partition(f".{experts.path}.{matrix.expert}.")
            name = f"re:{re.escape(head)}\\.{re.escape(experts.path)}\\.\\d+\\.{re.escape(tail)}"
        groups.setdefault(name, []).append(matrix)
    a = plan.architecture
    if plan.tied and a.embedding in groups and a.head in groups:
        # One matrix, which is kept or not.
        both = [*groups.pop(a.embedding), *groups.pop(a.head)]
        name = f"re:({re.escape(a.embedding)}|{re.escape(a.head)})$"
        return {name: both, **groups}
    return groups


def _measured(
    name: str, rows: list[MatrixPlan], plan: ModelPlan, own: Any, reference: Any, passes: Passes
) -> LayerError:
    tallies = {row.name: Tally() for row in rows}
    forwards = {row.name: exchange(own, reference, row.name, tallies[row.name]) for row in rows}
    with exchanged(reference, forwards):
        divergence = passes.divergence(_first_block(rows[0], plan))
    total = Tally.of(tallies.values())
    spec, activations = rows[0].weights, rows[0].activations
    there = [row for row in rows if row in plan.kept]
    stored = sum(_stored_bytes(row, own.get_submodule(row.name)) for row in there)
    count = sum(row.shape[0] * row.shape[1] for row in there)
    width = 4 if plan.recipe.dtype == "float32" else 2
    # Rules are about layers of blocks.
    wider, bits = (None, 0) if rows[0].block is None else _wider(spec)
    eight = 0 if wider is None else sum(_wider_bytes(wider, bits, row) for row in there) - stored
    kl, error = mean_with_error(divergence)
    return LayerError(
        name,
        tuple(row.name for row in rows),
        str(spec),
        None if activations is None else str(activations),
        tuple(tallies[row.name].tokens for row in rows),
        kl,
        error,
        total.output_error,
        total.weight_share,
        total.weight_error,
        total.weights_clipped,
        None if activations is None else total.activations_clipped,
        total.concentration,
        width * count - stored,
        None if wider is None else f"{name}={wider}",
        eight,
    )


def _first_block(row: MatrixPlan, plan: ModelPlan) -> int:
    if row.block is not None:
        return row.block
    return plan.dimensions.blocks if row.name == plan.architecture.head else 0


def _stored_bytes(row: MatrixPlan, layer: Any) -> int:
    """Return the bytes of a layer's codes, scales and zero points, as their formats have them."""
    spec = row.weights
    codes = row.shape[0] * row.shape[1] * spec.format.bits
    scales = int(layer.quantized.scales.size)
    points = 0 if layer.quantized.zero_points is None else spec.format.bits
    return (codes + scales * (spec.scale_format.bits + points)) // 8


def _wider(spec: QuantSpec) -> tuple[str | None, int]:
    """Return a quantizer of 8 bits with groups as long, and the bits of its scales' format."""
    if spec.format.bits >= 8:
        return None, 0
    if spec.granularity is Granularity.GROUP and spec.format.kind is FormatKind.INTEGER:
        return f"int8:group{spec.group_size}", spec.scale_format.bits
    # Scales of a rule are the recipe's, or bfloat16 if integers don't have such scales.
    floats = (ScaleFormat.FLOAT32, ScaleFormat.FLOAT16, ScaleFormat.BFLOAT16)
    scale = spec.scale_format if spec.scale_format in floats else ScaleFormat.BFLOAT16
    return "int8:channel", scale.bits


def _wider_bytes(wider: str, bits: int, row: MatrixPlan) -> int:
    rows, columns = row.shape
    scales = rows * columns // (row.weights.group_size or columns) if "group" in wider else rows
    return rows * columns + scales * bits // 8

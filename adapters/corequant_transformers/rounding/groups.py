"""Layers of a block that read the same input, rounded one group after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.rounding import RoundedTensor
from corequant_transformers.model.quantized_linear import QuantizedLinear
from corequant_transformers.model.surroundings import peak_rss_mib, to_host
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.rounding.layers import (
    quantized_layer,
    round_on_inputs,
    shared_global_scales,
)
from corequant_transformers.rounding.networks import Networks

__all__ = ["GroupRounding", "groups_of"]


def groups_of(rows: Sequence[MatrixPlan]) -> list[list[MatrixPlan]]:
    """Return a block's quantized rows by the input that they read, in their order.

    Layers next to each other in the same module that read the same norm share an input: query, key
    and value, gate and up, but not those of different experts.
    """
    groups: list[list[MatrixPlan]] = []
    for row in rows:
        parent = row.name.rpartition(".")[0]
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and row.norm is not None
            and row.norm == last.norm
            and parent == last.name.rpartition(".")[0]
        ):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@dataclass(eq=False)
class GroupRounding:
    """How a block's groups are rounded, and the rows of those that are.

    Attributes
    ----------
    block : torch.nn.Module
        With the layers' float weights.
    path : str
        Of the block in the model.
    executor : concurrent.futures.Executor, optional
    progress : callable
        Called after each group with the number of groups that are done.
    rare : tuple of (int, str)
        As for ``round_block``.
    table : list of dict
        Plain values for the report, one for each layer.
    """

    block: torch.nn.Module
    path: str
    executor: Executor | None
    progress: Callable[[int], None]
    rare: tuple[int, str]
    table: list[dict[str, Any]] = field(default_factory=list)
    _done: int = 0

    def run(
        self,
        networks: Networks,
        indices: Iterable[int],
        shared: Mapping[str, npt.NDArray[np.float32]],
    ) -> dict[str, QuantizedLinear]:
        """Round some of the networks' groups and return their layers by the rows' names.

        Parameters
        ----------
        networks : Networks
        indices : iterable of int
            The groups, in the order in which they run.
        shared : mapping of str to numpy.ndarray (1,), float32
            Global scales of the rows that have one.
        """
        layers: dict[str, QuantizedLinear] = {}
        for index in indices:
            group = networks.groups[index]
            started = time.monotonic()
            moments = networks.moments(index)
            tokens, how = moments.count, None
            if group[0].expert is not None and tokens < self.rare[0]:
                how = self.rare[1]
                moments = networks.rare_moments(index, how)
            found = round_on_inputs(group, self._weights(group), moments, shared, self.executor)
            seconds = time.monotonic() - started
            for row in group:
                name = row.name.removeprefix(f"{self.path}.")
                layer = quantized_layer(self.block.get_submodule(name), row, found[row.name])
                networks.place(name, layer)
                layers[row.name] = layer
                share = seconds / len(group)
                self.table.append(_report(row, found[row.name], tokens, how, share))
            del moments
            self._done += 1
            self.progress(self._done)
        return layers

    def global_scales(self, rows: Sequence[MatrixPlan]) -> dict[str, npt.NDArray[np.float32]]:
        """Return the global scales of the rows that have one, with all that share it among them."""
        return shared_global_scales(rows, self._weights(rows))

    def _weights(self, rows: Sequence[MatrixPlan]) -> dict[str, npt.NDArray[Any]]:
        weights: dict[str, npt.NDArray[Any]] = {}
        for row in rows:
            module: Any = self.block.get_submodule(row.name.removeprefix(f"{self.path}."))
            weights[row.name] = to_host(module.weight)
        return weights


def _report(
    row: MatrixPlan, rounded: RoundedTensor, tokens: int, rare: str | None, seconds: float
) -> dict[str, Any]:
    report = rounded.report
    damping = report.damping
    return {
        "name": row.name,
        **({} if tokens else {"unrouted": True}),
        **({"rare": rare} if rare else {}),
        "method": report.method,
        "loss_nearest": report.nearest_loss,
        "loss": report.loss,
        "damping": None if damping is None else damping.value,
        "relative_damping": None if damping is None else damping.relative,
        "damping_tries": None if damping is None else damping.tries,
        "dead_columns": len(report.dead_columns),
        "bounded_share": report.bounded_share,
        "shrinkage": report.shrinkage,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "peak_rss_mib": round(peak_rss_mib()),
    }

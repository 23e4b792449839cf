"""Collect the statistics that a plan needs while the float model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.calibration import ActivationStats
from corequant.errors import NonFiniteError
from corequant_transformers.calibration.choices import Calibration, needs_second_order, needs_tokens
from corequant_transformers.model.expert_calls import Room, StreamedPass
from corequant_transformers.model.expert_list import ExpertList
from corequant_transformers.model.forward import Windows, run_block
from corequant_transformers.model.parts import Parts, part_of
from corequant_transformers.model.streamed_experts import StreamedExperts
from corequant_transformers.planning.matrix_plan import Region
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["Collector", "collect_block"]

_RESERVOIR = 1024
"""Tokens kept of each layer: 6 MiB at 1536 channels."""

_ENERGY_TOKENS = 4096
"""Tokens after which the permutations made from energies gain nothing measurable."""


class Collector:
    """Statistics of a plan's regions, from the inputs of the layers that read them.

    Where choices are judged by tokens, the last window is held out. Some thousand tokens are enough
    for the second-order statistic.

    Parameters
    ----------
    plan : ModelPlan
    shape : tuple of int
        Number of windows, and their length.

    Attributes
    ----------
    statistics, held_out : dict of str to ActivationStats
        By the name of the region.
    routed : dict of str to int
        Tokens that reached rare experts whose statistics are those of all tokens of their layer, by
        the name of the region.
    position : int
        The window that is run.
    """

    def __init__(self, plan: ModelPlan, shape: tuple[int, int]) -> None:
        windows, length = shape
        self._seed = plan.recipe.seed
        self._regions = {region.name: region for region in plan.regions}
        self._windows = windows
        self._stride = _energy_stride(plan, windows * length)
        self._kept = _RESERVOIR if needs_tokens(plan) else 0
        # A single window has to serve for both.
        self._judging = windows - 1 if self._kept and windows > 1 else windows
        self.statistics: dict[str, ActivationStats] = {}
        self.held_out: dict[str, ActivationStats] = {}
        self.routed: dict[str, int] = {}
        self.position = 0

    def begin(self, region: Region) -> None:
        """Start a region's statistics, unless they are started."""
        if region.name in self.statistics:
            return
        self.statistics[region.name] = ActivationStats(
            region.width,
            energy_gram=needs_second_order(region),
            energy_stride=self._stride,
            reservoir=self._kept,
            seed=self._seed,
        )
        if self._kept:
            self.held_out[region.name] = ActivationStats(
                region.width, reservoir=self._kept, seed=self._seed
            )

    def forget(self, region: str) -> None:
        """Drop what is not needed any more."""
        for held in self._kinds().values():
            held.pop(region, None)

    def found(self, tokens: npt.NDArray[np.int64]) -> Calibration:
        """Return what was found on token windows."""
        return Calibration(tokens, self.statistics, self.held_out, routed=self.routed)

    def restart(self, rare: Iterable[str]) -> None:
        """Forget what regions of experts have seen, but for the number of their tokens."""
        for region in rare:
            self.routed[region] = self.statistics[region].count
            self.forget(region)

    def _kinds(self) -> dict[str, dict[str, ActivationStats]]:
        return {"statistics": self.statistics, "held_out": self.held_out}

    def state(self) -> dict[str, Windows]:
        """Return the statistics that are not dropped yet, as rows of arrays."""
        kept: dict[str, Windows] = {}
        for what, held in self._kinds().items():
            for region, statistics in held.items():
                for name, array in statistics.to_arrays().items():
                    kept[f"{what}:{region}:{name}"] = torch.from_numpy(np.atleast_2d(array))
        return kept

    def restore(self, state: Mapping[str, Windows]) -> None:
        """Take over what ``state`` returned; other entries are ignored."""
        found: dict[tuple[str, str], dict[str, npt.NDArray[Any]]] = {}
        for key, rows in state.items():
            what, _, rest = key.partition(":")
            if what in self._kinds():
                region, _, name = rest.rpartition(":")
                array = rows[0 : len(rows)].numpy()
                flat = array if name in ("gram", "energy_gram", "tokens") else array[0]
                found.setdefault((what, region), {})[name] = flat
        for (what, region), arrays in found.items():
            self.begin(self._regions[region])
            self._kinds()[what][region].restore(arrays)

    @contextmanager
    def watching(self, model: Any, readers: Iterable[tuple[Region, str]]) -> Iterator[None]:
        """Collect what the named layers read while the context lasts.

        Raises
        ------
        NonFiniteError
            From the model's run, if it holds NaN or infinity; names the layer and the window.
        """
        with ExitStack() as hooks:
            for region, reader in readers:
                self.begin(region)
                module = model.get_submodule(reader)
                handle = module.register_forward_pre_hook(self._hook(region, reader))
                hooks.callback(handle.remove)
            yield

    def _hook(
        self, region: Region, reader: str
    ) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            try:
                if self.position < self._judging:
                    seen = _tokens(x, region)
                    self.statistics[region.name].update(seen)
                if self._kept and (self.position >= self._judging or self._windows == 1):
                    self.held_out[region.name].update(_tokens(x, region))
            except NonFiniteError as error:
                name = f"the input of {reader} in calibration window {self.position}"
                raise NonFiniteError(name, error.count, error.index, error.value) from None

        return hook


@torch.no_grad()
def collect_block(
    parts: Parts,
    plan: ModelPlan,
    index: int,
    collector: Collector,
    hidden: Windows,
    arguments: dict[str, Any],
    progress: Callable[[str, int, int], None],
    room: Room,
    choose: Callable[[set[str]], None] = lambda regions: None,
) -> None:
    """Run an open float block over all windows and collect what its layers read.

    Parameters
    ----------
    parts : Parts
    plan : ModelPlan
    index : int
    collector : Collector
    hidden : Windows
        Input of the block, and where its output goes: elsewhere, as of a ``Crossing``, since rare
        experts are shown the input once more.
    arguments : dict
        Arguments of the block other than its hidden states.
    progress : callable
        Called as ``progress("calibrate", done, total)``, counting windows through all blocks.
    room : callable
        Gives room for what experts that are read few at a time are called with and give.
    choose : callable
        Called with the names of the regions of such experts while these are open, when all that
        they read is collected.
    """
    readers = [
        (region, reader)
        for region in plan.regions
        for reader in region.readers
        if part_of(f"{reader}.", plan) == index
    ]
    experts = {m.name: m.expert for m in plan.matrices if m.block == index}
    block, collected = parts.block(index), partial(_rare, plan, collector, experts)
    finish: Callable[[int], None] = partial(_advance, block, hidden, arguments)
    own, streamed = readers, parts.experts(index)
    if streamed is not None:
        passes = StreamedPass(block, streamed, hidden, arguments, room, "hidden")
        finish = passes.finish
        own = [(region, reader) for region, reader in readers if experts[reader] is None]
        for indices in streamed.groups():
            few = [(region, reader) for region, reader in readers if experts[reader] in indices]
            with streamed.opened(indices):
                _collect_experts(parts.model, collector, few, passes, streamed, indices, collected)
                choose({region.name for region, _ in few})
    with collector.watching(parts.model, own):
        for k in range(len(hidden)):
            collector.position = k
            finish(k)
            progress("calibrate", index * len(hidden) + k + 1, len(parts.blocks) * len(hidden))
    rare = collected(own)
    if not rare:
        return
    # They are shown all tokens; nothing is written this time.
    collector.restart(region.name for region in rare)
    lists = [m for m in block.modules() if isinstance(m, ExpertList)]
    with collector.watching(parts.model, [(region, region.name) for region in rare]):
        for module in lists:
            module.shared.update(rare.values())
        for k in range(len(hidden)):
            collector.position = k
            run_block(block, hidden[k : k + 1], arguments)
        for module in lists:
            module.shared.clear()


def _advance(block: Any, hidden: Windows, arguments: Mapping[str, Any], window: int) -> None:
    hidden[window] = run_block(block, hidden[window : window + 1], arguments, window)


def _rare(
    plan: ModelPlan,
    collector: Collector,
    experts: Mapping[str, int | None],
    readers: Iterable[tuple[Region, str]],
) -> dict[Region, int]:
    """Return the experts that are to be shown all tokens, by their regions."""
    found: dict[Region, int] = {}
    for region, reader in readers:
        expert = experts[reader]
        if plan.recipe.rare_experts != "shared" or expert is None or region.name != reader:
            continue
        if collector.statistics[region.name].count < plan.recipe.expert_tokens:
            found[region] = expert
    return found


def _collect_experts(
    model: Any,
    collector: Collector,
    readers: list[tuple[Region, str]],
    passes: StreamedPass,
    experts: StreamedExperts,
    indices: range,
    collected: Callable[[list[tuple[Region, str]]], dict[Region, int]],
) -> None:
    """Take all windows through a group of experts that are open, rare ones twice."""
    with collector.watching(model, readers):
        for k in range(len(passes.calls)):
            collector.position = k
            passes.add(k, indices)
    rare = collected(readers)
    collector.restart(region.name for region in rare)
    with collector.watching(model, [(region, region.name) for region in rare]):
        experts.shared.update(rare.values())
        for k in range(len(passes.calls)):
            collector.position = k
            x, chosen, shares = passes.calls.of(k, experts.device)
            experts.add(torch.zeros_like(x), x, chosen, shares, sorted(rare.values()))
        experts.shared.clear()


def _tokens(x: torch.Tensor, region: Region) -> torch.Tensor:
    """Return an activation with a row for each of the heads that share the region's channels."""
    repeat = region.side.repeat
    if repeat == 1:
        return x
    heads = x.reshape(*x.shape[:-1], region.side.heads, repeat, -1)
    return heads.transpose(-3, -2).reshape(*x.shape[:-1], repeat, region.width)


def _energy_stride(plan: ModelPlan, tokens: int) -> int:
    """Return which tokens enter the energy statistic: 4096 in all, and no fewer than an eighth."""
    if plan.dimensions.experts:
        # An expert sees few tokens anyway.
        return 1
    return min(8, max(2, tokens // _ENERGY_TOKENS))

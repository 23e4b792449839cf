"""The steps of quantizing a model, each about one part of it and based on those before.

First the float model runs over the calibration windows, block by block, and permutations and
factors are chosen (``calibrate``). Then each part is transformed in float64, compared with the
float model on some tokens, and rounded (``block``). What a step makes, and the hidden states that
the next one reads, go to a ledger, in memory or on the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import ArchitectureError
from corequant.recipe import Recipe
from corequant.recipe.layers import as_rule
from corequant_torch.device.onednn import QuickForward
from corequant_transformers.calibration.choices import (
    Calibration,
    block_of,
    choose,
    choose_block_size,
    width_of,
)
from corequant_transformers.calibration.collector import Collector, collect_block
from corequant_transformers.checkpoint.tensors import part_tensors
from corequant_transformers.model.forward import Crossing, Windows, enter
from corequant_transformers.model.parts import ENTRY, EXIT, OUTSIDE, Parts, part_plan
from corequant_transformers.model.surroundings import to_host
from corequant_transformers.planning.matrix_plan import Region
from corequant_transformers.planning.model_plan import VERIFIED_TOKENS, ModelPlan, replan
from corequant_transformers.planning.widths import with_rules
from corequant_transformers.rounding.layers import check_tied, round_nearest, round_unquantized
from corequant_transformers.rounding.replay import Replay
from corequant_transformers.run.blocks import BlockStep, Stacks, opened_layer, quantize_block
from corequant_transformers.run.ledger import Ledger, quantizes, steps_of, summarize
from corequant_transformers.run.sign_trials import SignTrials
from corequant_transformers.run.widths import Widths
from corequant_transformers.transforms.embeddings import transform_entry, transform_exit
from corequant_transformers.transforms.matrices import Choices
from corequant_transformers.transforms.outside import transform_writers
from corequant_transformers.transforms.verification import (
    check_any_changed,
    check_choices,
    check_logits_error,
    is_identity,
)

__all__ = ["Job"]

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What was chosen for regions: rows for the report, and permutations and factors."""

    rows: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]


class Job:
    """A model to be quantized.

    Parameters
    ----------
    parts : Parts
    plan : ModelPlan
    tokens : numpy.ndarray (windows, length), int64
    ledger : Ledger
    calibration : Calibration, optional
        Result of the first steps, which are left out then.
    executor : concurrent.futures.Executor, optional
        Rounds layers at the same time.
    progress : callable
        Called as ``progress(phase, done, total)``.
    after : callable
        Called with the name of each step that is done and the seconds that it took.

    Attributes
    ----------
    plan : ModelPlan
        With each layer's block size, once they are chosen.
    choices : Choices
    """

    def __init__(
        self,
        parts: Parts,
        plan: ModelPlan,
        tokens: Tokens,
        ledger: Ledger,
        *,
        calibration: Calibration | None = None,
        executor: Executor | None = None,
        progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
        after: Callable[[str, float], None] = lambda step, seconds: None,
    ) -> None:
        self.parts, self.plan, self.tokens, self.ledger = parts, plan, tokens, ledger
        self.calibration, self.executor = calibration, executor
        self.progress, self.after = progress, after
        self.steps = steps_of(plan)
        self.choices = Choices({}, {})
        self._permutations: dict[str, npt.NDArray[np.int64]] = {}
        self._factors: dict[str, npt.NDArray[np.float64]] = {}
        self._sizes: list[int] = []
        self._check_rounding()
        self._collector = Collector(plan, (tokens.shape[0], tokens.shape[1]))
        trials = calibration is None and plan.recipe.sign_trials > 1 and bool(plan.draw_signs())
        self._trials = SignTrials(parts, plan, tokens) if trials else None
        self._states = (*tokens.shape, plan.dimensions.hidden)
        self._verified = tokens[0, :VERIFIED_TOKENS]
        self._stacks = Stacks(parts, tokens, self._verified)
        self._replay = Replay(ledger.spare)
        budget = plan.recipe.bits is not None
        self._widths = Widths(parts, plan, tokens, ledger, progress) if budget else None

    def _check_rounding(self) -> None:
        for matrix in self.plan.quantized:
            if matrix.block is None and matrix.options.needs_moments:
                raise ArchitectureError(
                    "a matrix must be in a decoder block to be rounded by "
                    f"{matrix.options.method}, got {matrix.name}"
                )

    def calibrate(self) -> Calibration:
        """Run the float model over all windows and return its statistics; nothing is chosen.

        Raises
        ------
        NonFiniteError
            If weights or activations hold NaN or infinity.
        """
        self._stacks.prepare()
        with QuickForward():
            state = self._first_states()
            for index in self.parts.blocks:
                state = self._stacks.arrive(index, state, self.ledger)
                with self.parts.open(index):
                    state = self._measure(index, state)
            draw, losses = self._draw(state)
        return replace(self._found(), draw=draw, draw_losses=tuple(losses))

    def run(self) -> int:
        """Carry out the steps that are not done yet; return how many were.

        Raises
        ------
        CheckpointError, OutputError, RunError
            If files can't be read or written.
        HessianError, NonFiniteError
            If a layer's inputs or weights can't be used; names the layer.
        VerificationError
            If a transformed part doesn't compute what the float one does.
        """
        self._stacks.prepare()
        if self._widths is not None:
            self._widths.prepare()
        resumed = self.ledger.resume(self.steps)
        for step in self.steps[:resumed]:
            self._absorb(step)
        self._collector.restore(self.ledger.state())
        for step in self.steps[resumed:]:
            started = time.monotonic()
            with QuickForward():
                self._carry_out(step)
            self._absorb(step)
            self.after(step, time.monotonic() - started)
        return resumed

    def _carry_out(self, step: str) -> None:
        if self._widths is not None and step in self._widths.steps:
            self._widths.carry_out(step, self.plan, self.choices)
            return
        kind, _, index = step.partition("-")
        action: Callable[..., None] = getattr(self, f"_do_{kind}")
        action(step, *([int(index)] if index else []))

    def _absorb(self, step: str) -> None:
        """Take over what a step chose."""
        if step == "allocate":
            rules = map(as_rule, self.ledger.report(step)["rules"])
            self.plan = self._replanned(with_rules(self.plan.recipe, rules))
        if not step.startswith("calibrate") and step != "choose":
            return
        report = self.ledger.report(step)
        if "block_size" in report:
            self._sizes.append(report["block_size"])
        for name, tensor in self.ledger.tensors(step).items():
            what, _, region = name.partition(":")
            if what == "permutation":
                self._permutations[region] = tensor.numpy()
            else:
                self._factors[region] = tensor.numpy()
        if step == "choose":
            if self._sizes:
                recipe = replace(self.plan.recipe, block_size=tuple(self._sizes))
                self.plan = self._replanned(recipe)
            signs = self.plan.draw_signs(report["signs"]["draw"])
            unmoved = frozenset(name for name, p in self._permutations.items() if is_identity(p))
            self.choices = Choices(self._permutations, {**signs, **self._factors}, unmoved)

    # ---- calibrating

    def _do_calibrate(self, step: str, index: int) -> None:
        found = self.calibration
        state = self._first_states() if index == 0 else self.ledger.state()
        state = self._stacks.arrive(index, state, self.ledger) if found is None else state
        following: dict[str, Windows] = {}
        early = _Chosen([], {})
        with self.parts.open(index):
            if found is None:
                choose = partial(self._choose_early, early)
                following = self._measure(index, state, choose)
                found = self._found()
            report, tensors = self._choose(index, found, early)
        self.ledger.commit(step, report, tensors, {**following, **self._collector.state()})

    def _found(self) -> Calibration:
        return self._collector.found(self.tokens)

    def _first_states(self) -> dict[str, Windows]:
        if self.calibration is not None:
            return {}
        state = {"hidden": self.ledger.windows("hidden", self._states, torch.float32)}
        with self.parts.open(ENTRY), torch.no_grad():
            for k, window in enumerate(self.tokens):
                state["hidden"][k] = enter(self.parts, window)
            if self._trials is not None:
                state["draws"] = self.ledger.windows("draws", self._trials.shape, torch.float32)
                self._trials.enter(state["draws"])
        return state

    @torch.no_grad()
    def _measure(
        self,
        index: int,
        state: Mapping[str, Windows],
        choose: Callable[[set[str]], None] = lambda regions: None,
    ) -> dict[str, Windows]:
        after = self.ledger.windows("hidden-next", self._states, torch.float32)
        states = Crossing(state["hidden"], after)
        arguments = self._stacks.arguments(torch.float32, index, state, "hidden")
        collect_block(
            self.parts,
            self.plan,
            index,
            self._collector,
            states,
            arguments,
            self.progress,
            self.ledger.windows,
            choose,
        )
        following: dict[str, Windows] = {"hidden": after, **self._stacks.carried(state)}
        if self._trials is not None:
            draws = self.ledger.windows("draws-next", self._trials.shape, torch.float32)
            self._trials.advance(index, Crossing(state["draws"], draws))
            following["draws"] = draws
        return following

    def _choose_early(self, chosen: _Chosen, names: set[str]) -> None:
        """Choose for experts that are open, whose statistics needn't be kept then."""
        if self.plan.recipe.block_size != "auto":
            own = [k for k, region in enumerate(self.plan.regions) if region.name in names]
            self._choose_regions(self.plan, own, self._found(), chosen)

    def _choose(
        self, index: int | None, found: Calibration, chosen: _Chosen | None = None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Choose for the regions that lie in a block, or for those that span several."""
        plan, chosen = self.plan, chosen or _Chosen([], {})
        report: dict[str, Any] = {"regions": chosen.rows}
        regions: dict[int, Region] = dict(enumerate(plan.regions))
        done = {row["index"] for row in chosen.rows}
        own = [k for k, r in regions.items() if block_of(r, plan) == index and k not in done]
        if index is not None and plan.recipe.block_size == "auto":
            outputs = {m.name for m in plan.mlp_outputs}
            read = [k for k in own if regions[k].name in outputs]
            # A layer that is kept has no rotation.
            size = choose_block_size(plan, read, found) or width_of(plan, index)
            report["block_size"] = size
            plan = self._plan_with(index, size)
        self._choose_regions(plan, own, found, chosen)
        return report, chosen.tensors

    def _choose_regions(
        self, plan: ModelPlan, own: list[int], found: Calibration, chosen: _Chosen
    ) -> None:
        regions = plan.regions
        for k in own:
            name = regions[k].name
            choice = choose(plan, k, found, self._weight)
            if choice.permutation is not None:
                chosen.tensors[f"permutation:{name}"] = torch.from_numpy(choice.permutation)
            if choice.factors is not None:
                chosen.tensors[f"factors:{name}"] = torch.from_numpy(choice.factors)
            chosen.rows.append({"index": k, **choice.row})
            if self.calibration is None:
                self._collector.forget(name)

    def _plan_with(self, index: int, size: int) -> ModelPlan:
        sizes = [size if i == index else width_of(self.plan, i) for i in self.parts.blocks]
        return self._replanned(replace(self.plan.recipe, block_size=tuple(sizes)))

    def _replanned(self, recipe: Recipe) -> ModelPlan:
        return replan(self.plan, self.parts.model.config, recipe)

    def _weight(self, name: str) -> npt.NDArray[Any]:
        with opened_layer(self.parts, name) as layer:
            return to_host(layer.weight)

    def _draw(self, state: Mapping[str, Windows]) -> tuple[int, list[float]]:
        """Return which draw of signs loses least, and the losses of all that were tried."""
        if self._trials is None:
            return 0, []
        with self.parts.open(EXIT), torch.no_grad():
            losses = self._trials.losses(state["draws"])
        return int(np.argmin(losses)), losses

    def _do_choose(self, step: str) -> None:
        found = self.calibration
        if found is None:
            found = self._found()
            draw, losses = self._draw(self.ledger.state())
        else:
            draw, losses = found.draw, list(found.draw_losses)
        report, tensors = self._choose(None, found)
        report["signs"] = {"draw": draw, "losses": losses}
        self.ledger.commit(step, report, tensors, {})

    # ---- quantizing

    def _do_outside(self, step: str) -> None:
        with self.parts.open(OUTSIDE) as model:
            changed, error = transform_writers(model, part_plan(self.plan, OUTSIDE), self.choices)
            round_unquantized(model, self.plan, OUTSIDE, changed)
            tensors = part_tensors(model, self.plan, OUTSIDE)
        self.ledger.commit(step, {"changed": len(changed), "error": error}, tensors, {})

    @torch.no_grad()
    def _do_entry(self, step: str) -> None:
        shape = (1, len(self._verified), self.plan.dimensions.hidden)
        state = {
            name: self.ledger.windows(name, shape, torch.float64)
            for name in ("reference", "transformed")
        }
        moving = check_choices(self.plan, self.choices)
        with self.parts.open(ENTRY) as model:
            before, after, changed = transform_entry(
                self.parts, self.plan, self.choices, self._verified
            )
            state["reference"][0], state["transformed"][0] = before, after
            round_unquantized(model, self.plan, ENTRY)
            rows = round_nearest(model, part_plan(self.plan, ENTRY), self.executor)
            if self.plan.needs_moments:
                names = ["quantized"]
                if self.plan.needs_float and self.plan.recipe.reference == "model":
                    names.append("float")
                for name in names:
                    state[name] = self.ledger.windows(name, self._states, torch.float32)
                for k, window in enumerate(self.tokens):
                    first = enter(self.parts, window)
                    for name in names:
                        state[name][k] = first
            tensors = part_tensors(model, self.plan, ENTRY)
        self._report_progress(1)
        report = {"changed": changed, "moving": moving, "matrices": rows}
        self.ledger.commit(step, report, tensors, state)

    def _do_block(self, step: str, index: int) -> None:
        given = (self.parts, self.plan, self.choices, self.ledger, self._stacks, self._replay)
        quantize_block(BlockStep(*given, step, index), self.executor, self.progress)
        self._report_progress(index + 2)

    @torch.no_grad()
    def _do_exit(self, step: str) -> None:
        if self.plan.architecture.enclosed:
            # The modules after the blocks were kept with those before them.
            error = self.ledger.report(self.quantizing_steps[-2])["error"]
            self.ledger.commit(step, {"changed": 0, "error": error, "matrices": []}, {}, {})
            return
        state = self.ledger.state()
        ids = torch.from_numpy(self._verified)[None].to(self.parts.device)
        with self.parts.open(EXIT) as model:
            states = (state["reference"][0:1], state["transformed"][0:1])
            error, changed = transform_exit(self.parts, self.plan, self.choices, states, ids)
            check_logits_error(error)
            round_unquantized(model, self.plan, EXIT)
            rows = round_nearest(model, part_plan(self.plan, EXIT), self.executor)
            check_tied(model, self.plan, self.ledger.tensors(ENTRY))
            tensors = part_tensors(model, self.plan, EXIT)
        changes = [self.ledger.report(s)["changed"] for s in self.quantizing_steps[:-1]]
        check_any_changed(changed + sum(changes))
        self._report_progress(len(self.parts.order))
        report = {"changed": changed, "error": error, "matrices": rows}
        self.ledger.commit(step, report, tensors, {})

    def _report_progress(self, done: int) -> None:
        self.progress("quantize", done, len(self.parts.order))

    # ---- the result

    @property
    def quantizing_steps(self) -> list[str]:
        """The steps whose tensors make up the quantized model."""
        return [step for step in self.steps if quantizes(step)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the quantized model's tensors by name."""
        found: dict[str, torch.Tensor] = {}
        for step in self.quantizing_steps:
            found |= self.ledger.tensors(step)
        return found

    def report(self) -> dict[str, Any]:
        """Return the report's rows, as ``summarize``."""
        return summarize(self.ledger, self.steps, len(self.plan.online))

"""Verification of a description on random weights, before a model's own are read.

Verifying a transformed model proves that this model computes what it did. It can't tell a wrong
description from a right one where the model's weights hide the difference: gains of 1, biases of 0,
a layer that is still zero, a recipe that leaves part of the description unused. With random weights
instead, and with every transform that the description allows, nothing is hidden: what
holds for weights at random holds for all but a vanishing share of them, and for these the model's
own verification decides.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from corequant.errors import (
    BlockSizeError,
    HadamardOrderError,
    NonFiniteError,
    RecipeError,
    VerificationError,
)
from corequant.hadamard import valid_block_sizes
from corequant.recipe import Recipe
from corequant_transformers.model.forward import block_arguments, run_block
from corequant_transformers.model.parts import ENTRY, EXIT, Parts, part_plan, skeleton
from corequant_transformers.model.sources import Source
from corequant_transformers.planning.model_plan import ModelPlan, plan_model
from corequant_transformers.transforms.embeddings import transform_entry, transform_exit
from corequant_transformers.transforms.matrices import Choices
from corequant_transformers.transforms.verification import (
    KeepFloat64,
    Verification,
    check_block_error,
    check_logits_error,
    stream_error,
    transform_checked,
)

__all__ = ["RandomWeights", "random_choices", "rehearse"]

_TOKENS = 32
_SPREAD = 0.3


class RandomWeights:
    """Random weights for a skeleton, the same each time a part is opened.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A skeleton.
    """

    def __init__(self, model: Any) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._buffers = dict(model.named_buffers(remove_duplicate=False))

    def fill(self, model: Any, keys: Sequence[str]) -> None:
        """Set the parameters of these names in the modules of ``model``, in float32."""
        for key in keys:
            path, _, name = key.rpartition(".")
            module = model.get_submodule(path)
            if name in module._buffers:
                module._buffers[name] = self._buffer(key)
            else:
                value = _random(key, self._parameters[key])
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)

    def _buffer(self, key: str) -> torch.Tensor:
        own: torch.Tensor = self._buffers[key]
        # Integers and single numbers are settings rather than weights.
        if own.is_floating_point() and own.ndim:
            return _random(key, own)
        return torch.zeros(own.shape, dtype=own.dtype) if own.is_meta else own.float()


def _random(key: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    drawn: torch.Tensor = torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        return drawn.div(like.shape[-1] ** 0.5)
    # Gains, which may be those of a norm, mustn't come near zero.
    base = 1.0 if key.endswith("weight") else 0.0
    return drawn.clamp(-2, 2).mul(_SPREAD).add(base)


def random_choices(plan: ModelPlan, seed: int = 0) -> Choices:
    """Return random permutations, signs and scales wherever a plan has places for them.

    Parameters
    ----------
    plan : ModelPlan
    seed : int
    """
    generator = np.random.default_rng(seed)
    permutations, factors = {}, dict(plan.draw_signs())
    for region in plan.regions:
        if region.permuted:
            order = np.arange(region.width).reshape(region.side.heads, -1)
            permutations[region.name] = generator.permuted(order, axis=1).reshape(-1)
        if region.factored:
            signs = generator.choice([-1.0, 1.0], region.width)
            scales = generator.uniform(0.5, 2.0, region.width)
            only_signs = plan.recipe.factors == "signs"
            factors[region.name] = signs if only_signs else signs * scales
    return Choices(permutations, factors)


def rehearse(
    given: Source | Any,
    plan: ModelPlan,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Verification | None:
    """Transform and verify a model with random weights.

    Parameters
    ----------
    given : Source or transformers.PreTrainedModel
        Only its structure is read.
    plan : ModelPlan
    device : torch.device or str
    progress : callable
        Called as ``progress(phase, done, total)``.

    Returns
    -------
    Verification or None
        None if the description comes with the package; for a decoder inside of another model, and
        for a model of which only the blocks are described: what surrounds them reads more than
        tokens.

    Raises
    ------
    VerificationError
        If the description doesn't hold: outputs differ, a matrix that should change doesn't, or
        matrices that should read the same activation don't. Names the first decoder block.
    """
    if plan.is_shipped or plan.architecture.outside or plan.architecture.enclosed:
        return None
    model = given.skeleton() if isinstance(given, Source) else skeleton(given)
    full = _fullest(model.config, plan)
    parts = Parts(model, full, RandomWeights(model), device)
    try:
        with torch.no_grad():
            return _rehearse(parts, full, progress)
    except NonFiniteError as error:
        raise VerificationError(f"{_words(plan)}: with random weights, {error}") from None
    except VerificationError as error:
        raise VerificationError(f"{_words(plan)}: with random weights, {error}") from None


def _words(plan: ModelPlan) -> str:
    kind = plan.architecture.model_type
    return f"the description that was found for {kind!r} doesn't hold for this model"


def _fullest(config: Any, plan: ModelPlan) -> ModelPlan:
    """Return the plan with all transforms that a description allows."""
    a, given = plan.architecture, plan.recipe
    widths = {m.shape[1] for m in plan.mlp_outputs}
    for factors in ("scales", "none"):
        for size in (_least(widths), None):
            recipe = Recipe(
                block_size=size, permutation="random", factors=factors, dtype=given.dtype
            )
            try:
                return replace(plan_model(config, recipe, a), tied=False)
            except (BlockSizeError, HadamardOrderError, RecipeError):
                continue
    # Where a width has no Hadamard matrix, what the recipe does is all that can be done.
    return plan


def _least(widths: set[int]) -> int | None:
    common = int(np.gcd.reduce(list(widths))) if widths else 1
    sizes = [size for size in valid_block_sizes(common) if size > 1]
    return sizes[0] if sizes else None


def _rehearse(
    parts: Parts, plan: ModelPlan, progress: Callable[[str, int, int], None]
) -> Verification:
    generator = np.random.default_rng(plan.recipe.seed)
    tokens = generator.integers(0, plan.dimensions.vocabulary, _TOKENS)
    choices = random_choices(plan)
    with KeepFloat64():
        arguments = block_arguments(parts, tokens, torch.float64)
    steps = len(parts.order)
    with parts.open(ENTRY):
        before, after, changed = transform_entry(parts, plan, choices, tokens)
    progress("rehearse", 1, steps)
    errors = []
    for index in parts.blocks:
        with parts.open(index) as model:
            model.double()
            block, rows = parts.block(index), part_plan(plan, index)
            with KeepFloat64(), _same_inputs(model, rows):
                before = run_block(block, before, arguments[index])
            changed += transform_checked(model, rows, choices)
            with KeepFloat64():
                after = run_block(parts.block(index), after, arguments[index])
            model.float()
        errors.append(stream_error(before, after, plan, choices))
        check_block_error(index, errors[-1])
        progress("rehearse", index + 2, steps)
    ids = torch.from_numpy(tokens)[None].to(parts.device)
    with parts.open(EXIT):
        logits_error, last = transform_exit(parts, plan, choices, (before, after), ids)
    check_logits_error(logits_error)
    progress("rehearse", steps, steps)
    permutations = len(choices.permutations)
    return Verification(logits_error, tuple(errors), changed + last, len(plan.online), permutations)


@contextmanager
def _same_inputs(model: Any, rows: ModelPlan) -> Iterator[None]:
    """Compare the inputs of matrices that are described as readers of one activation."""
    seen: dict[str, dict[str, torch.Tensor]] = {}
    with ExitStack() as stack:
        for matrix in rows.matrices:
            # An expert sees some of the tokens only.
            if matrix.reads and matrix.expert is None:
                module = model.get_submodule(matrix.name)

                def look(
                    module: Any, args: Any, read: str = matrix.reads, name: str = matrix.name
                ) -> None:
                    seen.setdefault(read, {})[name] = args[0].detach()

                stack.callback(module.register_forward_pre_hook(look).remove)
        yield
    for readers in seen.values():
        (first, one), *others = readers.items()
        for name, other in others:
            if one.numel() != other.numel() or not torch.equal(one.reshape(-1), other.reshape(-1)):
                raise VerificationError(
                    f"{first} and {name} must read the same activation as they are described, got "
                    "two that differ"
                )

"""Model types without a description whose modules are those of a described type.

A type is recognized by its structure alone: a description has to place every parameter of the
model, with its shape, and every norm has to behave as described. What lies between modules can't be
seen that way; the verification in float64 decides about that, first on random weights
(``transforms.rehearsal``), then on the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from corequant.errors import ArchitectureError, CorequantError
from corequant.recipe import Recipe
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.known import (
    UnknownArchitectureError,
    architecture_of,
    kept_architecture,
    known_architectures,
    own_config,
)
from corequant_transformers.architectures.unknown import undescribed
from corequant_transformers.model.layouts import check_modules, check_places, standardized
from corequant_transformers.planning.model_plan import ModelPlan, plan_model

__all__ = [
    "Recognition",
    "architecture_in",
    "norm_behaves",
    "plan_recognized",
    "recognize",
]

_MOST_NAMED = 4
_UNFIT = (ArchitectureError, AttributeError, IndexError, KeyError, RuntimeError, TypeError)
"""Errors of a description whose modules differ in kind from the model's."""

_PLAINEST = Recipe(rotation="heads", permutation="identity", activations=None)


@dataclass(frozen=True)
class Recognition:
    """A description that fits a model whose type has none.

    Attributes
    ----------
    architecture : Architecture
        Under the model's own type.
    like : tuple of str
        The described types that it is the description of, the nearest first.
    """

    architecture: Architecture
    like: tuple[str, ...]

    @property
    def note(self) -> str:
        """Note for plan and report."""
        others = self.like[1 : 1 + _MOST_NAMED]
        more = f" (as are those of {', '.join(map(repr, others))})" if others else ""
        return (
            f"the model type {self.architecture.model_type!r} has no description; its modules, "
            f"their shapes and the kinds of its norms are those of {self.like[0]!r}{more}, whose "
            "description is used; it is verified in float64 on random weights and on the model's "
            "own"
        )


def plan_recognized(
    model: Any,
    recipe: Recipe,
    config: Any,
    names: Callable[[], list[str]] | None,
    error: UnknownArchitectureError,
) -> ModelPlan:
    """Plan for a model whose type has no description but is recognized.

    Parameters
    ----------
    model : transformers.PreTrainedModel or callable
        Model or its skeleton, or a function that makes it.
    recipe : Recipe
    config : transformers.PreTrainedConfig
        Config of the model.
    names : callable, optional
        Returns the names of the model's parameters, for an error message.
    error : UnknownArchitectureError
        Error of planning without a description.

    Raises
    ------
    ArchitectureError
        If no description fits; says what one would have to say.
    """
    made = model if isinstance(model, torch.nn.Module) else model()
    found = _find(made, recipe)
    if isinstance(found, Recognition):
        table = plan_model(config, recipe, found.architecture)
        return replace(table, notes=(found.note, *table.notes))
    if found is not None:
        raise found from None
    raise undescribed(error, list(made.state_dict()) if names is None else names()) from None


def architecture_in(model: Any) -> Architecture:
    """Return the description of a model: its own, that of its type, or a recognized one.

    Raises
    ------
    ArchitectureError
        If there is none.
    """
    own = kept_architecture(model)
    if own is not None:
        return own
    try:
        return architecture_of(own_config(model))
    except UnknownArchitectureError:
        found = recognize(model)
        if found is None:
            raise
        return found.architecture


def recognize(model: Any) -> Recognition | None:
    """Return the description of another model type that fits a model; None if none does.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Possibly a skeleton. It is only read.

    Returns
    -------
    Recognition or None
        The description, if several fit, of the type whose config has the most fields in common.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> from corequant_transformers.model.recognition import recognize
    >>> model = cqhf.tiny_model("gemma")
    >>> model.config.model_type = "of somebody else"
    >>> recognize(model).like[0]
    'gemma'
    """
    found = _find(model, Recipe())
    return found if isinstance(found, Recognition) else None


def _find(model: Any, recipe: Recipe) -> Recognition | CorequantError | None:
    """Return the description that fits, or else an error of one that may fit, or else None."""
    kind = model.config.model_type
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    hindrance: CorequantError | None = None
    fitting: list[tuple[float, Recognition]] = []
    for architecture, types in _descriptions(set(names)):
        candidate = replace(architecture, model_type=kind)
        try:
            if not _fits(model, plan_model(model.config, recipe, candidate)):
                continue
        except _UNFIT:
            continue
        except CorequantError as error:
            if hindrance is None and _could_fit(model, candidate):
                hindrance = error
            continue
        nearest = sorted(types, key=lambda t: -_nearness(model.config, t))
        found = Recognition(candidate, tuple(nearest))
        fitting.append((_nearness(model.config, nearest[0]), found))
    if not fitting:
        return hindrance
    return max(fitting, key=lambda pair: pair[0])[1]


def _could_fit(model: Any, candidate: Architecture) -> bool:
    """Return whether a description fits a model that a recipe can't be carried out on."""
    try:
        return _fits(model, plan_model(model.config, _PLAINEST, candidate))
    except (CorequantError, *_UNFIT):
        return False


def _descriptions(modules: set[str]) -> Iterator[tuple[Architecture, list[str]]]:
    """Yield the descriptions that name modules of a model, each with the types that have it."""
    found: dict[Architecture, list[str]] = {}
    for kind, architecture in known_architectures().items():
        if architecture.enclosed:
            continue
        outer = (architecture.embedding, architecture.head, architecture.block_path(0))
        if modules.issuperset(outer):
            found.setdefault(replace(architecture, model_type=""), []).append(kind)
    yield from found.items()


def _nearness(config: Any, kind: str) -> float:
    """Return the share of config fields that two types have in common, from 0 to 1."""
    if kind not in CONFIG_MAPPING:
        return 0.0
    own, theirs = set(vars(config)), set(vars(CONFIG_MAPPING[kind]()))
    return len(own & theirs) / len(own | theirs)


def _fits(model: Any, plan: ModelPlan) -> bool:
    """Return whether a plan has a model's norms; ArchitectureError if it lacks parameters."""
    check_places(model, plan.architecture)
    with standardized(model, plan):
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_modules(plan, shapes)
    a, width = plan.architecture, plan.dimensions.hidden
    return all(norm_behaves(model.get_submodule(name), a, width) for name in plan.norms)


# ---- norms, by what they compute


def norm_behaves(norm: Any, architecture: Architecture, width: int) -> bool:
    """Return whether a norm computes what the described kind does.

    Parameters
    ----------
    norm : torch.nn.Module
        Left as it is.
    architecture : Architecture
    width : int
        Channels of the residual stream.
    """
    a = architecture
    generator = torch.Generator().manual_seed(0)
    own = copy.deepcopy(norm).to_empty(device="cpu").double()
    for parameter in own.parameters():
        drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.5 + drawn
    # So large that no epsilon shows.
    x = 1e4 * torch.randn(4, width, generator=generator, dtype=torch.float64)
    weight, bias = getattr(own, "weight", None), getattr(own, "bias", None)
    with torch.no_grad():
        wanted = x - x.mean(-1, keepdim=True) if a.subtracts_mean else x
        wanted = wanted * wanted.square().mean(-1, keepdim=True).rsqrt()
        wanted = wanted if weight is None else wanted * (weight + a.gain_offset)
        wanted = wanted if bias is None else wanted + bias
        error = (own(x) - wanted).abs().max() / wanted.abs().max()
    # Some compute in float32.
    return bool(error < 1e-5)

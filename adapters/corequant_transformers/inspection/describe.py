"""The description of a model: its own, that of another type, or a draft."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corequant.errors import CorequantError, VerificationError
from corequant.recipe import Recipe
from corequant_transformers.architectures.description import Architecture
from corequant_transformers.architectures.known import (
    UnknownArchitectureError,
    architecture_of,
    known_architectures,
    own_config,
)
from corequant_transformers.inspection.guess import guess
from corequant_transformers.model.parts import skeleton
from corequant_transformers.model.recognition import Recognition, recognize
from corequant_transformers.model.replicas import unwrap
from corequant_transformers.model.sources import Source
from corequant_transformers.model.surroundings import undisturbed
from corequant_transformers.pipeline import plan_for
from corequant_transformers.planning.model_plan import ModelPlan, plan_model
from corequant_transformers.transforms.rehearsal import rehearse

__all__ = ["Description", "describe"]

_RECIPE = Recipe(rotation="heads", permutation="identity", activations=None)


@dataclass(frozen=True)
class Description:
    """Result of ``describe``.

    Attributes
    ----------
    architecture : Architecture or None
        None if nothing could be found.
    origin : str
        ``described``, ``recognized`` or ``guessed``.
    notes : tuple of str
        Similar types of a recognized type; otherwise open questions.
    verified : float or None
        Largest relative error of logits on random weights, of a model that isn't described; None
        if the description doesn't hold.
    """

    architecture: Architecture | None
    origin: str
    notes: tuple[str, ...] = ()
    verified: float | None = None

    def to_toml(self) -> str:
        """Return the description as TOML, below comments; whole unless it is guessed."""
        lines = [*self.notes]
        if self.origin == "guessed":
            lines.insert(0, "Draft of a description. Omitted fields are those of Llama.")
        if self.verified is not None:
            lines.append(
                f"Verified on random weights: logits agree to {self.verified:.0e} (float64)."
            )
        comments = "".join(f"# {' '.join(line.split())}\n" for line in lines)
        if self.architecture is None:
            return comments
        return f"{comments}{self.architecture.to_toml(whole=self.origin != 'guessed')}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        a = self.architecture
        return {
            "origin": self.origin,
            "architecture": None if a is None else a.to_dict(),
            "notes": list(self.notes),
            "verified": self.verified,
        }


@undisturbed()
def describe(model: str | Path | Any) -> Description:
    """Return the description of a model, or a draft if its type has none.

    Parameters
    ----------
    model : str, Path or transformers.PreTrainedModel
        Weights are neither read nor changed.

    Returns
    -------
    Description

    Raises
    ------
    ArchitectureError, CheckpointError
        If the model can't be read, or its config asks for what its type's description excludes.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> found = cqhf.describe(cqhf.tiny_model("qwen2"))
    >>> found.origin, found.architecture.query
    ('described', 'self_attn.q_proj')
    """
    given = Source(model) if isinstance(model, str | Path) else unwrap(model)
    config = given.config() if isinstance(given, Source) else own_config(given)
    try:
        found = architecture_of(config)
        whole = known_architectures().get(config.model_type, found)
        return Description(whole, "described")
    except UnknownArchitectureError:
        bare = given.skeleton() if isinstance(given, Source) else skeleton(given)
    recognized = recognize(bare)
    if recognized is not None:
        return _recognized(given, recognized, plan_for(bare, _RECIPE))
    architecture, unclear = guess(bare)
    if architecture is None:
        return Description(None, "guessed", tuple(unclear))
    return _tried(given, config, architecture, unclear)


def _recognized(given: Any, found: Recognition, plan: ModelPlan) -> Description:
    """Return the description of a recognized type, verified on random weights."""
    notes, verified = [found.note], None
    try:
        tried = rehearse(given, plan)
        verified = None if tried is None else tried.logits_error
    except VerificationError as error:
        notes.append(f"Its modules are connected differently: {error}")
    return Description(found.architecture, "recognized", tuple(notes), verified)


def _tried(given: Any, config: Any, architecture: Architecture, unclear: list[str]) -> Description:
    """Return a guessed description, verified on random weights."""
    verified = None
    try:
        found = rehearse(given, plan_model(config, _RECIPE, architecture))
        verified = None if found is None else found.logits_error
    except (CorequantError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # A guess may name anything, and the model's own code is run with what it leads to.
        what = "It doesn't hold" if isinstance(error, VerificationError) else "It doesn't fit"
        unclear.append(f"{what} yet: {str(error)[:400]}")
    return Description(architecture, "guessed", tuple(unclear), verified)

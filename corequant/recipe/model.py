"""How a model is quantized, as one frozen value that reads and writes TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from corequant._validation import need_packages
from corequant.errors import AccumulatorError, RecipeError
from corequant.recipe.budget import settle_budget
from corequant.recipe.fields import (
    CHOICES,
    activation_spec,
    check_choice,
    check_numbers,
    check_specs,
    has_budget,
    scales_beside,
    spec_text,
    vocabulary_spec,
    vocabulary_text,
    weight_spec,
)
from corequant.recipe.layers import LayerRule, as_rule, check_pattern, combine, is_match
from corequant.recipe.preset import DEFAULT_PRESET, PRESETS, Preset, find_preset
from corequant.recipe.settings import FLOAT, LayerSettings, left_out, read_accumulator
from corequant.rounding.methods import RoundingOptions, rounding_methods
from corequant.specs import QuantSpec

__all__ = ["Recipe"]

_WEIGHTS = QuantSpec.parse("int4:channel:symmetric:mse")
_ACTIVATIONS = QuantSpec.parse("int4:token:asymmetric")


@dataclass(frozen=True)
class Recipe:
    """How to permute, rotate and quantize a model.

    The first sentence about each field is also the help text of its command-line option.

    Attributes
    ----------
    block_size : int, tuple of int or "auto", optional
        Block length of the online rotation at each ``down_proj``; the full vector by default, or
        chosen for each layer with ``auto``. A tuple gives each layer its own. ``auto`` takes the
        least power of two, from 16, whose error on held-out tokens is within ``tolerance`` of the
        full rotation's.
    rotation : str
        Rotations left at run time: only that of ``down_proj`` (``merged``), one for every layer
        (``online``) or none (``offline``, ``heads``). ``merged`` rotates the residual stream and
        the value heads once, in the weights around them. ``online`` merges no rotation: the input
        of every quantized layer is rotated by blocks, and the residual stream is only permuted,
        once for the whole model. ``offline`` merges what ``merged`` does and leaves the input of
        ``down_proj`` alone, so that every reader of ordinary models can take the result. ``heads``
        merges the rotation of the value heads alone: residual stream and norms stay as they are,
        and with them a tied head, which a rotation of the stream unties.
    head_block_size : int, optional
        Block length of the merged rotation between value and output projections; whole heads by
        default. Where blocks are smaller than a head, its channels are permuted among themselves.
    tolerance : float
        Relative error that ``block_size`` ``auto`` may add to the full rotation's.
    permutation : str
        Assignment of channels to blocks: one of ``PERMUTATIONS``, where ``auto`` tries all and
        keeps the best for each layer.
    factors : str
        Factors merged through the linear path of the MLP before its rotation: one of ``FACTORS``,
        where ``scales`` includes signs.
    weights : QuantSpec
        Quantizer of the linear layers' weights: format, granularity, symmetry and scale search.
        Read from a string, it searches its scales by squared error unless the string says
        ``absmax``.
    activations : QuantSpec, optional
        Quantizer of the linear layers' inputs at run time; None leaves them in float.
    embeddings : QuantSpec, optional
        Quantizer of the embedding, one row a token, rounded to nearest; None keeps ``dtype``. Read
        from a string, it searches its scales, and stores them as those of ``weights`` are, unless
        the string says otherwise.
    head : QuantSpec, optional
        Quantizer of the head, like ``embeddings``; a head that is tied stays so if both are equal.
    dtype : str
        Dtype of what isn't quantized, such as norms, biases, embedding and head: one of ``DTYPES``.
        ``auto`` is the model's own, and bfloat16 for a float32 model or a GGUF file. Transforms are
        verified in float64 before anything is rounded to it.
    random_signs : bool
        Multiply the residual stream by random signs before it is rotated. Without them the first
        channel of the rotated stream is the sum of all, which has a far larger range.
    sign_trials : int
        Number of draws of the random signs, of which the least lossy is kept. The loss is that of
        the rounded model on the first 512 tokens of the last calibration window.
    rounding : str
        Rounding method of the weights: one of ``ROUNDINGS``. All but ``nearest`` use what each
        layer reads in calibration.
    damping : float, optional
        Damping of ``gptq`` or ``qronos``; the method's own by default. ``gptq`` takes it relative
        to H's mean diagonal (default 0.01), ``qronos`` relative to its largest eigenvalue (default
        1e-3, and 1e-4 where activations stay in float).
    reference : str
        Outputs that ``gpfq``, ``qronos``, ``learned`` and ``correction`` approximate: of the float
        ``block`` on quantized inputs, or of the float ``model``. The latter also corrects what all
        earlier blocks lost, but keeps a second stream of hidden states.
    act_order : bool
        Round the columns of large inputs first.
    correction : float
        Strength of GPTAQ's correction in ``gptq``; 0.25 in its authors' code.
    refit : bool
        Choose the scales of a group of columns when its first column is rounded.
    fit_scales : bool
        Choose scales that minimize the error of each layer's outputs, not of its weights. With it
        ``nearest`` uses calibration inputs too.
    magr : float
        Strength of MagR, which shrinks the range of weights before rounding. Its authors take 0.001
        for scales by channel, 0.0001 for groups.
    accumulator : str, optional
        Accumulator that no dot product of codes may overflow: a width in bits, or tile and width as
        in ``128x16``. What zero points of activations contribute is added outside of it.
    steps : int
        Gradient steps of ``learned`` rounding.
    samples : int
        Number of calibration windows.
    sequence_length : int
        Tokens per calibration window.
    sampling : str
        How calibration windows are taken from the documents: one of ``SAMPLINGS``. ``consecutive``
        cuts the documents, joined in their order, from the beginning; ``random`` draws documents,
        and places in them, by ``seed``.
    seed : int
        Random seed.
    expert_tokens : int
        Number of calibration tokens below which an expert is rare.
    rare_experts : str
        What rare experts are permuted and rounded for: one of ``RARE_EXPERTS``. ``shared`` is all
        tokens of their layer; ``nearest`` keeps their channels in place and rounds to nearest.
    layers : tuple of LayerRule
        Rules for some layers: a pattern and the quantizers of weights and activations, such as
        down_proj=int8:channel,int8 or model.layers.0=int8:channel. Several may be given, as strings
        or mappings, too; all that match a layer apply in their order, and of what they say about
        the same the last counts.
    keep : tuple of str
        Patterns of layers that stay in float, such as down_proj, model.layers.0 or re:.*o_proj.
        They do so whatever ``layers`` says; see ``LayerRule`` about patterns.
    bits : float, optional
        Upper limit of the mean bits per weight of all linear layers, scales included. Within it,
        each layer gets the width that suits the model best. The widths become rules of ``layers``;
        layers that have a rule for their weights keep it. None gives all layers ``weights``.
    size : int or str, optional
        Upper limit of the size of the result, such as 80MB, within which the widths of layers are
        chosen as with ``bits``.
    candidates : tuple of QuantSpec
        Quantizers of weights that ``bits`` and ``size`` choose from; by default the integers of 2,
        3, 4, 5, 6 and 8 bits, with the scales of ``weights``, that the result's program can load.
    sensitivity : str
        Cost of a layer's width, for ``bits`` and ``size``: one of ``SENSITIVITIES``. ``kl`` is the
        effect of errors of its outputs on the predicted probabilities, by gradients; ``output`` is
        the relative squared error of the outputs, ``weights`` that of the weights.
    units : str
        Layers that get the same width, for ``bits`` and ``size``: one of ``UNITS``. With
        ``layers``, each layer gets its own, except for the experts of a block; with ``inputs``,
        layers that read the same input, such as query, key and value, share one, as vLLM requires.

    Raises
    ------
    RecipeError
        If a field is invalid.
    AccumulatorError
        If the accumulator is too narrow for any weight.

    Examples
    --------
    >>> from corequant.recipe import Recipe
    >>> recipe = Recipe(block_size=16, weights="int4:channel:symmetric")
    >>> str(recipe.weights), str(recipe.activations)
    ('int4:channel:symmetric:mse', 'int4:token:asymmetric')
    >>> Recipe.from_toml(recipe.to_toml()) == recipe
    True
    """

    block_size: int | tuple[int, ...] | str | None = None
    rotation: str = "merged"
    head_block_size: int | None = None
    tolerance: float = 0.05
    permutation: str = "massdiff"
    factors: str = "none"
    weights: QuantSpec = _WEIGHTS
    activations: QuantSpec | None = _ACTIVATIONS
    embeddings: QuantSpec | None = None
    head: QuantSpec | None = None
    dtype: str = "auto"
    random_signs: bool = True
    sign_trials: int = 1
    rounding: str = "nearest"
    damping: float | None = None
    reference: str = "block"
    act_order: bool = True
    correction: float = 0.0
    refit: bool = False
    fit_scales: bool = False
    magr: float = 0.0
    accumulator: str | None = None
    steps: int = 400
    samples: int = 8
    sequence_length: int = 2048
    sampling: str = "consecutive"
    seed: int = 0
    expert_tokens: int = 32
    rare_experts: str = "shared"
    layers: tuple[LayerRule, ...] = ()
    keep: tuple[str, ...] = ()
    bits: float | None = None
    size: int | None = None
    candidates: tuple[QuantSpec, ...] = ()
    sensitivity: str = "kl"
    units: str = "layers"

    if TYPE_CHECKING:
        # Fields have the types that are read; these are those that are accepted.
        def __init__(
            self,
            block_size: int | Sequence[int] | str | None = ...,
            rotation: str = ...,
            head_block_size: int | None = ...,
            tolerance: float = ...,
            permutation: str = ...,
            factors: str = ...,
            weights: QuantSpec | str = ...,
            activations: QuantSpec | str | None = ...,
            embeddings: QuantSpec | str | None = ...,
            head: QuantSpec | str | None = ...,
            dtype: str = ...,
            random_signs: bool = ...,
            sign_trials: int = ...,
            rounding: str = ...,
            damping: float | None = ...,
            reference: str = ...,
            act_order: bool = ...,
            correction: float = ...,
            refit: bool = ...,
            fit_scales: bool = ...,
            magr: float = ...,
            accumulator: int | str | None = ...,
            steps: int = ...,
            samples: int = ...,
            sequence_length: int = ...,
            sampling: str = ...,
            seed: int = ...,
            expert_tokens: int = ...,
            rare_experts: str = ...,
            layers: Sequence[LayerRule | str | Mapping[str, Any]] = ...,
            keep: Sequence[str] = ...,
            bits: float | None = ...,
            size: int | str | None = ...,
            candidates: Sequence[QuantSpec | str] = ...,
            sensitivity: str = ...,
            units: str = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        """Parse specs that are strings and refuse invalid values."""
        object.__setattr__(self, "weights", weight_spec(self.weights))
        object.__setattr__(self, "activations", activation_spec(self.activations))
        for name in CHOICES:
            check_choice(name, getattr(self, name))
        if isinstance(self.block_size, list):
            object.__setattr__(self, "block_size", tuple(self.block_size))
        check_numbers(self)
        if not isinstance(self.weights, QuantSpec):
            raise RecipeError(f"weights must be a QuantSpec, got {type(self.weights).__name__}")
        check_specs(self.weights, self.activations)
        if isinstance(self.accumulator, int) and not isinstance(self.accumulator, bool):
            object.__setattr__(self, "accumulator", str(self.accumulator))
        if self.reference != "block" and not rounding_methods()[self.rounding].needs_moments:
            raise RecipeError(
                f"reference must be 'block' with rounding {self.rounding!r}, got {self.reference!r}"
            )
        for name in ("embeddings", "head"):
            object.__setattr__(self, name, vocabulary_spec(self, name))
        self.rounding_options()
        self._settle_layers()
        if has_budget(self) or self.candidates != ():
            for name, value in settle_budget(self).items():
                object.__setattr__(self, name, value)

    def _settle_layers(self) -> None:
        given = {"layers": self.layers, "keep": self.keep}
        for name, values in given.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise RecipeError(f"{name} must be a list, got {values!r}")
        scales = scales_beside(self.weights)
        rules = tuple(as_rule(value, scales) for value in self.layers)
        object.__setattr__(self, "layers", rules)
        object.__setattr__(self, "keep", tuple(self.keep))
        for pattern in self.keep:
            check_pattern("a pattern of keep", pattern)

    def settings_of(self, layer: str) -> LayerSettings:
        """Return how a linear layer is quantized, by the path of its module.

        Raises
        ------
        AccumulatorError, RecipeError
            If what the rules come to for it contradicts itself; names the layer.
        """
        if any(is_match(pattern, layer) for pattern in self.keep):
            return FLOAT
        rules = tuple(rule for rule in self.layers if is_match(rule.pattern, layer))
        try:
            return _settle(self, rules)
        except (AccumulatorError, RecipeError) as error:
            raise type(error)(f"layers, for {layer}: {error}") from None

    def rounding_options(self) -> RoundingOptions:
        """Return how weights are rounded, for ``round_together``."""
        damping = self.damping
        if damping is None and self.activations is None:
            damping = rounding_methods()[self.rounding].weight_only_damping
        accumulator = None
        try:
            if self.accumulator is not None:
                accumulator = read_accumulator(self.accumulator, self.weights, self.activations)
            options = RoundingOptions(
                self.rounding,
                damping,
                self.act_order,
                self.correction,
                self.refit,
                self.fit_scales,
                self.magr,
                accumulator,
                self.steps,
            )
            options.check_spec(self.weights)
        except AccumulatorError:
            raise
        except (TypeError, ValueError) as error:
            raise RecipeError(str(error)) from error
        return options

    @classmethod
    def preset(
        cls, name: str = DEFAULT_PRESET, *, reader: str | None = None, **changes: Any
    ) -> Recipe:
        """Return a preset's recipe, the same as ``corequant quantize --preset NAME`` takes.

        ``Recipe()`` is not a preset but the defaults of the fields: INT4 weights and activations,
        rounded to nearest, to compare with.

        Parameters
        ----------
        name : str
            A key of ``presets()``; w4a16 by default.
        reader : str, optional
            Program that the result is for, as in ``--for``; the preset's own by default.
        **changes
            Fields that differ; those that need another rotation bring it, see ``Preset.fields``.

        Raises
        ------
        RecipeError
            If there is no such preset, it isn't for that reader, or a field is unknown or invalid.

        Examples
        --------
        >>> from corequant.recipe import Recipe
        >>> recipe = Recipe.preset("w4a16", seed=1)
        >>> recipe.rounding, recipe.activations, recipe.seed
        ('qronos', None, 1)
        """
        return cls.from_dict(find_preset(name).fields(reader, **changes))

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Return all presets by name: descriptions, readers, and what was measured."""
        return {name: find_preset(name) for name in PRESETS}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: specs in string form, absent ones left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        # An absent block size is the default, absent activations are not.
        values["activations"] = "none" if self.activations is None else str(self.activations)
        values["weights"] = spec_text(self.weights)
        values |= {name: vocabulary_text(self, name) for name in ("embeddings", "head")}
        if isinstance(self.block_size, tuple):
            values["block_size"] = list(self.block_size)
        values["layers"] = [rule.to_dict() for rule in self.layers] or None
        values["keep"] = list(self.keep) or None
        values["candidates"] = [spec_text(spec) for spec in self.candidates] or None
        if not has_budget(self):
            values |= dict.fromkeys(("sensitivity", "units"))
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values; an unknown key is a RecipeError."""
        if not isinstance(values, Mapping):
            raise RecipeError(f"a recipe must map keys to values, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RecipeError(
                f"unknown recipe key {unknown[0]!r}, expected one of {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_toml(self) -> str:
        """Write the recipe as TOML (needs tomli-w, of the extra ``transformers``)."""
        need_packages("Recipe.to_toml", "transformers", "tomli_w")
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Read what ``to_toml`` writes; malformed TOML is a RecipeError."""
        try:
            # Some editors write a byte order mark first.
            values = tomllib.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            # Numbers of thousands of digits raise ValueError, deep nesting RecursionError.
            raise RecipeError(f"the recipe is not valid TOML: {error}") from error
        return cls.from_dict(values)


@lru_cache(256)
def _settle(recipe: Recipe, rules: tuple[LayerRule, ...]) -> LayerSettings:
    """Return what a recipe comes to for a layer that some of its rules are for."""
    changes = combine(rules) if rules else {}
    if changes is None:
        return FLOAT
    own = recipe
    if changes:
        changes |= left_out(
            changes.get("rounding", recipe.rounding),
            changes.get("weights", recipe.weights),
            other="rounding" in changes and changes["rounding"] != recipe.rounding,
        )
        own = replace(recipe, layers=(), keep=(), **changes)
    return LayerSettings(own.weights, own.activations, own.rounding_options(), own.permutation)

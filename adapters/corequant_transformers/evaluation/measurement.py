"""A model measured over windows of tokens, alone or against another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant.errors import ArchitectureError
from corequant_torch.device.onednn import QuickForward
from corequant_transformers.architectures.dimensions import dimensions_of
from corequant_transformers.architectures.known import keep_architecture
from corequant_transformers.calibration.data.given import TextData, text_windows
from corequant_transformers.checkpoint.reader import is_quantized, load
from corequant_transformers.evaluation.divergence import Divergence, compare_positions, summarize
from corequant_transformers.evaluation.perplexity import perplexity_with_error, window_losses
from corequant_transformers.model.forward import check_ids, check_positions
from corequant_transformers.model.layouts import check_places
from corequant_transformers.model.logits import window_logits
from corequant_transformers.model.recognition import architecture_in
from corequant_transformers.model.replicas import check_given, replicate
from corequant_transformers.model.sources import Source
from corequant_transformers.model.surroundings import device_of, undisturbed

__all__ = ["Evaluation", "check_vocabulary", "evaluate", "reference_model", "replica_of"]

Tokens = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Result of ``evaluate``.

    Attributes
    ----------
    perplexity : float
        exp of the mean negative log-likelihood, in nats, over all predicted positions.
    windows, sequence_length, predicted : int
        Windows, tokens per window, positions predicted in all.
    perplexity_se : float or None
        Standard error of the perplexity as an estimate for more text of the same kind. Windows are
        its units, since the tokens of one depend on each other: the perplexity times the error of
        the mean of the windows' mean losses. None for a single window.
    divergence : Divergence or None
        Distance to the reference, if there was one.
    """

    perplexity: float
    windows: int
    sequence_length: int
    predicted: int
    perplexity_se: float | None = None
    divergence: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what was measured, and those of the divergence among them."""
        return {
            "perplexity": self.perplexity,
            "perplexity_se": self.perplexity_se,
            "windows": self.windows,
            "sequence_length": self.sequence_length,
            "predicted": self.predicted,
            **({} if self.divergence is None else self.divergence.to_dict()),
        }


@undisturbed()
def evaluate(
    model: Any,
    text: TextData,
    tokenizer: Any = None,
    *,
    against: Any = None,
    windows: int | None = None,
    sequence_length: int = 2048,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure perplexity over consecutive windows of a text, and the distance to another model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Float or loaded by ``corequant_transformers.load``. It is only read, so that it may run
        elsewhere meanwhile, and is measured in evaluation mode, whatever its own; its hooks run.
    text : str, Path, sequence of Path, Documents, Sample or numpy.ndarray (windows, length)
        Text, tokenised as a whole without special tokens; files and folders as for
        ``read_documents``, or what it returned; or token windows.
    tokenizer : transformers tokenizer, optional
        Needed for text.
    against : transformers.PreTrainedModel or str or Path, optional
        The reference, usually the float model that ``model`` was made from, or where it is: a
        directory or a GGUF file. Both run one window at a time, side by side in memory.
    windows : int, optional
        Number of windows to evaluate; all by default.
    sequence_length : int
        Tokens per window, when ``text`` is text. Each window starts without context, so it
        predicts one position fewer.
    progress : callable
        Called as ``progress(done, total)``, counting windows.

    Returns
    -------
    Evaluation
        With ``against``, its ``divergence`` holds the Kullback-Leibler divergence, agreements and
        the reference's perplexity. Softmaxes are computed in float64, from the models' own logits.

    Raises
    ------
    ArchitectureError
        If the model's architecture is unknown, or it lacks an embedding or a head.
    BackendError
        If weights of the model are not in memory.
    CalibrationError
        If the text is empty or too short, or token windows of a wrong shape or with ids that the
        model has no row for.
    CheckpointError
        If ``against`` is a path without a model.
    NonFiniteError
        If logits hold NaN or infinity.
    ShapeError
        If the vocabularies differ.

    Examples
    --------
    >>> import numpy as np, corequant_transformers as cqhf
    >>> model = cqhf.tiny_model("llama")
    >>> tokens = np.arange(64).reshape(2, 32)
    >>> result = cqhf.evaluate(model, tokens)
    >>> result.windows, result.predicted, 50 < result.perplexity < 500
    (2, 62, True)
    >>> from corequant.recipe import Recipe
    >>> recipe = Recipe(weights="int8:channel", activations=None)
    >>> made = cqhf.quantize(model, recipe, tokens)
    >>> found = cqhf.evaluate(made.model, tokens, against=model).divergence
    >>> 0 < found.kl < 1e-3 < found.top1 <= 1
    True
    """
    model = check_given(model, floating=False)
    tokens = text_windows(text, tokenizer, sequence_length, windows)
    own, reference = _prepared(model, tokens), None
    if against is not None:
        reference = _prepared(reference_model(against, device_of(own)), tokens)
    found: dict[str, list[Values]] = {}
    for done, window in enumerate(tokens):
        for name, values in _measured(own, reference, window).items():
            found.setdefault(name, []).append(values)
        progress(done + 1, len(tokens))
    positions = {name: np.stack(rows) for name, rows in found.items()}
    count, length = tokens.shape
    total, error = perplexity_with_error(positions["loss"])
    divergence = None if reference is None else summarize(positions)
    return Evaluation(total, count, length, count * (length - 1), error, divergence)


def replica_of(model: Any) -> Any:
    """Return a replica to run.

    Raises
    ------
    ArchitectureError
        If the model's architecture is unknown, or it lacks an embedding or a head.
    """
    architecture = architecture_in(model)
    if architecture.enclosed:
        raise ArchitectureError(
            f"model must predict the next token to be measured on text, got {type(model).__name__}"
        )
    check_places(model, architecture)
    own = replicate(model)
    keep_architecture(own, architecture)
    own.config.return_dict = True
    return own


def check_vocabulary(model: Any, tokens: Tokens) -> None:
    """Raise CalibrationError for tokens (windows, length) that a model has no row for."""
    embedding = model.get_submodule(architecture_in(model).embedding)
    check_ids(tokens, len(getattr(embedding, "weight", ())) or model.config.vocab_size)


def reference_model(against: Any, device: torch.device | str = "cpu") -> Any:
    """Return the reference model, loaded if its location was given.

    Parameters
    ----------
    against : transformers.PreTrainedModel or str or Path
    device : torch.device or str
        Where a model that is loaded goes.
    """
    if not isinstance(against, str | Path):
        return check_given(against, floating=False)
    if is_quantized(against):
        return load(against).to(device)
    return Source(against).load().to(device)


def _prepared(model: Any, tokens: Tokens) -> Any:
    """Return a replica to run on token windows, if the model can read them."""
    own = replica_of(model)
    architecture = architecture_in(own)
    check_positions(architecture, dimensions_of(own.config, architecture), tokens)
    check_vocabulary(own, tokens)
    return own


def _measured(model: Any, reference: Any, window: Tokens) -> dict[str, Values]:
    """Return the measures at each position of a window."""
    if reference is None:
        return {"loss": window_losses(model, window)}
    found: dict[str, list[Values]] = {}
    following = torch.from_numpy(window[1:])
    with QuickForward():
        pairs = zip(window_logits(reference, window), window_logits(model, window), strict=True)
        for theirs, ours in pairs:
            targets, following = following[: len(ours)], following[len(ours) :]
            for name, values in compare_positions(theirs, ours, targets).items():
                found.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in found.items()}

"""Text to windows of tokens, and a model's perplexity on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from corequant._validation import check_index
from corequant.errors import CalibrationError
from corequant_torch.cpu.onednn import QuickForward
from corequant_transformers.architectures.known import (
    architecture_of,
    dimensions_of,
)
from corequant_transformers.model.forward import check_ids, check_positions, check_tokens
from corequant_transformers.model.layouts import check_places
from corequant_transformers.model.replicas import check_given, replicate, standing_in
from corequant_transformers.model.surroundings import undisturbed

__all__ = [
    "Evaluation",
    "evaluate",
    "perplexity",
    "token_windows",
]

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measured.

    Attributes
    ----------
    perplexity : float
        exp of the mean negative log-likelihood, in nats, over all predicted positions.
    windows, sequence_length, predicted : int
        Windows, tokens per window, positions predicted in all.
    """

    perplexity: float
    windows: int
    sequence_length: int
    predicted: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def token_windows(
    text: str, tokenizer: Any, sequence_length: int, windows: int | None = None
) -> Tokens:
    """Cut the tokenised text into consecutive windows; no special tokens are added.

    Parameters
    ----------
    text : str
        Tokenised as a whole.
    tokenizer : transformers tokenizer
    sequence_length : int
        Tokens per window; the rest of the text that doesn't fill one is dropped.
    windows : int, optional
        Number of windows to return; all by default.

    Returns
    -------
    numpy.ndarray (windows, sequence_length), int64

    Raises
    ------
    CalibrationError
        If the text is empty, shorter than one window, or shorter than ``windows`` of them.
    """
    length = check_index("sequence_length", sequence_length, 2)
    if not text.strip():
        raise CalibrationError("the text must not be empty, got only white space")
    # A long text is fine here: it is cut into windows before the model sees it.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // length
    if available == 0:
        raise CalibrationError(
            f"the text must fill one window of sequence_length={length} tokens, got {len(ids)}"
        )
    wanted = available if windows is None else check_index("windows", windows)
    if wanted > available:
        raise CalibrationError(
            f"the text must fill {wanted} windows of {length} tokens, it has {len(ids)} tokens and "
            f"fills {available}"
        )
    return np.array(ids[: wanted * length], np.int64).reshape(wanted, length)


@undisturbed()
def evaluate(
    model: Any,
    text: str | Tokens,
    tokenizer: Any = None,
    *,
    windows: int | None = None,
    sequence_length: int = 2048,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure perplexity over consecutive windows of a text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Float or loaded by ``corequant_transformers.load``. It is only read, so that it may run
        elsewhere meanwhile, and is measured in evaluation mode, whatever its own; its hooks run.
    text : str or numpy.ndarray (windows, length)
        Text, tokenised as a whole without special tokens, or token windows.
    tokenizer : transformers tokenizer, optional
        Needed for text.
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

    Raises
    ------
    ArchitectureError
        If the model's architecture is unknown, or it lacks an embedding or a head.
    BackendError
        If weights of the model are not in memory.
    CalibrationError
        If the text is empty or too short, or token windows of a wrong shape or with ids that the
        model has no row for.

    Examples
    --------
    >>> import numpy as np, corequant_transformers as cqhf
    >>> model = cqhf.tiny_model("llama")
    >>> tokens = np.arange(64).reshape(2, 32)
    >>> result = cqhf.evaluate(model, tokens)
    >>> result.windows, result.predicted, 50 < result.perplexity < 500
    (2, 62, True)
    """
    model = check_given(model, floating=False)
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("tokenizer must be given with text, got None")
        tokens = token_windows(text, tokenizer, sequence_length, windows)
    else:
        tokens = check_tokens(text)
        tokens = tokens if windows is None else tokens[: check_index("windows", windows)]
    architecture = architecture_of(model.config)
    check_places(model, architecture)
    check_positions(architecture, dimensions_of(model.config), tokens)
    embedding = model.get_submodule(architecture.embedding)
    check_ids(tokens, len(getattr(embedding, "weight", ())) or model.config.vocab_size)
    own = replicate(model)
    own.config.return_dict = True
    total = perplexity(own, tokens, progress)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    windows, sequence_length = tokens.shape
    return Evaluation(total, windows, sequence_length, predicted)


def perplexity(
    model: Any,
    tokens: Tokens,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Return the perplexity over windows of a model that no other thread runs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A replica or a skeleton with open parts.
    tokens : numpy.ndarray (windows, length), int64
    progress : callable
        Called as ``progress(done, total)``, counting windows.
    """
    total = 0.0
    for done, window in enumerate(tokens):
        with QuickForward():
            total += _negative_log_likelihood(model, window)
        progress(done + 1, len(tokens))
    return float(np.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1))))


@torch.no_grad()
def _negative_log_likelihood(model: Any, window: Tokens) -> float:
    architecture = architecture_of(model.config)
    trunk = model.get_submodule(architecture.embedding.rpartition(".")[0])
    head: Any = model.get_submodule(architecture.head).weight
    # Layers of torch's own quantization have a method of that name, and run on the CPU.
    ids = torch.from_numpy(window).to(getattr(head, "device", "cpu"))
    found: list[Any] = []
    forward = trunk.forward

    def once(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        found.append((output, output.last_hidden_state))
        output.last_hidden_state = output.last_hidden_state[:, :1]
        return output

    # Through the whole model: what its own forward and its hooks do before the trunk counts.
    with standing_in(trunk, once):
        whole = model(input_ids=ids[None], use_cache=False)
    if not found:
        # A function in the place of the model's forward found another trunk by itself.
        return _loss(whole.logits[0, :-1], ids[1:])
    output, hidden = found[0]
    hidden, total = hidden[:, :-1], 0.0
    # What stands between the last hidden states and the logits besides the head, such as a soft
    # cap, is the model's own affair: it runs with a trunk that has its answer already.
    with standing_in(trunk, lambda *args, **kwargs: output):
        # The vocabulary is wide: logits of a few hundred positions at a time bound the memory.
        for start in range(0, hidden.shape[1], 256):
            output.last_hidden_state = hidden[:, start : start + 256]
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            total += _loss(logits, ids[1:][start : start + 256])
    return total


def _loss(logits: torch.Tensor, target: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum"))

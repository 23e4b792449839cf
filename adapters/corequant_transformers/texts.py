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
from corequant_torch.quick import QuickForward
from corequant_transformers.architectures import (
    Architecture,
    Dimensions,
    architecture_of,
    dimensions_of,
)

__all__ = ["Evaluation", "evaluate", "token_windows"]

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
        Only the first so many; all by default.

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
        Float or loaded by ``corequant_transformers.load``.
    text : str or numpy.ndarray (windows, length)
        Text, tokenised as a whole without special tokens, or token windows.
    tokenizer : transformers tokenizer, optional
        Needed for text.
    windows : int, optional
        Evaluate only the first so many windows.
    sequence_length : int
        Tokens per window, when ``text`` is text. Each window starts without context, so it
        predicts one position fewer.
    progress : callable
        Told how many windows of how many are done.

    Returns
    -------
    Evaluation

    Raises
    ------
    CalibrationError
        If the text is empty or too short, or token windows of a wrong shape.

    Examples
    --------
    >>> import numpy as np, corequant_transformers as cqhf
    >>> model = cqhf.tiny_model("llama")
    >>> tokens = np.arange(64).reshape(2, 32)
    >>> result = cqhf.evaluate(model, tokens)
    >>> result.windows, result.predicted, 50 < result.perplexity < 500
    (2, 62, True)
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise TypeError("tokenizer must be given with text, got None")
        tokens = token_windows(text, tokenizer, sequence_length, windows)
    else:
        tokens = check_tokens(text)[:windows]
    check_positions(architecture_of(model.config), dimensions_of(model.config), tokens)
    total = 0.0
    for done, window in enumerate(tokens):
        with QuickForward():
            total += _negative_log_likelihood(model, window)
        progress(done + 1, len(tokens))
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    windows, sequence_length = tokens.shape
    return Evaluation(float(np.exp(total / predicted)), windows, sequence_length, predicted)


def check_tokens(tokens: Any) -> Tokens:
    """Return integer token windows (n, length) as int64; anything else is a CalibrationError."""
    array = np.asarray(tokens)
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0 or array.shape[1] < 2:
        raise CalibrationError(
            "token windows must be integers (windows, length) with at least one window of two "
            f"tokens, got dtype {array.dtype} and shape {array.shape}"
        )
    return array.astype(np.int64)


def check_positions(architecture: Architecture, dimensions: Dimensions, tokens: Tokens) -> None:
    """Raise CalibrationError for windows longer than a model with learned positions can read."""
    length, most = tokens.shape[1], dimensions.positions - architecture.extra_positions
    if architecture.positions is not None and length > most:
        raise CalibrationError(
            f"sequence_length must be at most {most}, the model's max_position_embeddings, "
            f"got {length}"
        )


@torch.no_grad()
def _negative_log_likelihood(model: Any, window: Tokens) -> float:
    architecture = architecture_of(model.config)
    trunk = model.get_submodule(architecture.embedding.rpartition(".")[0])
    ids = torch.from_numpy(window).to(model.get_submodule(architecture.head).weight.device)
    found: list[Any] = []
    forward = trunk.forward

    def once(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        found.append((output, output.last_hidden_state))
        output.last_hidden_state = output.last_hidden_state[:, :1]
        return output

    # Through the whole model: files of other libraries may decode their weights when it is called.
    trunk.forward = once
    try:
        model(input_ids=ids[None], use_cache=False)
    finally:
        del trunk.forward
    output, hidden = found[0]
    hidden, total = hidden[:, :-1], 0.0
    # What stands between the last hidden states and the logits besides the head, such as a soft
    # cap, is the model's own affair: it runs with a trunk that has its answer already.
    trunk.forward = lambda *args, **kwargs: output
    try:
        # The vocabulary is wide: logits of a few hundred positions at a time bound the memory.
        for start in range(0, hidden.shape[1], 256):
            output.last_hidden_state = hidden[:, start : start + 256]
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
            target = ids[1:][start : start + 256]
            total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    finally:
        del trunk.forward
    return total

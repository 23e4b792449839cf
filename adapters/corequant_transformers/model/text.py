"""Token windows of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from corequant._validation import check_index
from corequant.errors import CalibrationError

__all__ = ["token_windows"]

Tokens = npt.NDArray[np.int64]


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

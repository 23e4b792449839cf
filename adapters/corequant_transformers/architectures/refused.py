"""Model types that can't be described, and why."""

from __future__ import annotations

__all__ = ["REASONS"]

REASONS = {
    "gemma3n_text": (
        "its blocks mix several residual streams by weights that depend on the token, and read an "
        "embedding of their own, so that neither what a block reads nor its input can be told by "
        "norms and linear layers"
    ),
    "llama4": (
        "Transformers' own Llama4ForConditionalGeneration raises an error in every forward pass, "
        "with images and without; its text part, of the type llama4_text, can be"
    ),
    "vit": "it reads images, and calibration has text alone",
    "whisper": "its encoder reads sound, and calibration has text alone",
}
"""By model type."""

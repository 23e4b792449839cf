"""Model types that can't be described, and why."""

from __future__ import annotations

__all__ = ["REASONS"]

REASONS = {
    "gemma3n_text": (
        "its blocks mix several residual streams with weights that depend on the token, and read "
        "an embedding of their own, which norms and linear layers alone don't describe"
    ),
    "llama4": (
        "Transformers' Llama4ForConditionalGeneration raises an error in every forward pass, with "
        "or without images; its text model, llama4_text, is supported"
    ),
    "vit": "it reads images, and calibration data is text",
    "whisper": "its encoder reads audio, and calibration data is text",
}
"""By model type."""

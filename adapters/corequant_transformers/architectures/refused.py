"""Model types that can't be described, and why."""

from __future__ import annotations

__all__ = ["REASONS"]

REASONS = {
    "gemma3n_text": (
        "its blocks mix several residual streams by weights that depend on the token, and read an "
        "embedding of their own, so that neither what a block reads nor its input can be told by "
        "norms and linear layers"
    ),
}
"""By model type."""

"""The ``corequant`` command."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command, or say what it needs where that is missing."""
    try:
        from corequant.cli.app import run
    except ImportError as error:
        print(
            f"the corequant command can't start ({error}); install what it needs with: "
            'pip install "corequant[transformers]"',
            file=sys.stderr,
        )
        sys.exit(1)
    sys.exit(run())

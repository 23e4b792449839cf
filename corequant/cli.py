"""The ``corequant`` command."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command, or say what it needs where that is missing."""
    try:
        from corequant_cli.app import run

        status = run()
    except ImportError as error:
        print(
            f"corequant: something is missing that the command needs ({error}); install it with: "
            'pip install "corequant[transformers]"',
            file=sys.stderr,
        )
        sys.exit(1)
    sys.exit(status)

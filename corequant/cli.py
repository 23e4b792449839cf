"""The ``corequant`` command."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command, or name the package that it lacks."""
    try:
        from corequant_cli.app import run

        status = run()
    except ImportError as error:
        print(
            f"corequant: a package that the command needs is missing ({error}); install it with: "
            'pip install "corequant[transformers]"',
            file=sys.stderr,
        )
        sys.exit(1)
    sys.exit(status)

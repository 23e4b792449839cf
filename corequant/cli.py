"""The ``corequant`` command."""

from __future__ import annotations

import gc
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command, or name the package that it lacks."""
    # Half of the time that torch and Transformers take to import is the garbage collector's, which
    # finds nothing; commands turn it on again once these are there.
    gc.disable()
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
    # At the end Python would go through all objects once more.
    gc.freeze()
    sys.exit(status)

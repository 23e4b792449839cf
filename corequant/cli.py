"""The ``corequant`` command."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading

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
    _leave(status)


def _leave(status: int) -> None:
    """End the process, without Python taking torch apart where that is loaded: 0.2 s."""
    # At the end Python would go through all objects once more.
    gc.freeze()
    alone = all(t is threading.current_thread() or t.daemon for t in threading.enumerate())
    if "torch" in sys.modules and alone:
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # such as a closed pipe, which Python reports
            sys.exit(status)
        os._exit(status)
    sys.exit(status)

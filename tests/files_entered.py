"""Count the files of this project whose functions a first call enters, against limits.

Usage: python tests/files_entered.py [--list] [NAME ...]

Each call is the first in a process of its own, under a profile hook. Only functions count: what
runs while a module is imported is not a call that a reader has to follow. ``block_hadamard`` runs
with an empty cache of compiled code, the others with a filled one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

LIMITS = {"block_hadamard": 14, "quantize": 9, "gptq": 18, "model": 60}
COLD = ("block_hadamard",)


def prepared(name: str) -> Callable[[], Any]:
    """Return a call whose function has been imported and whose arguments exist."""
    import numpy as np

    import corequant as cq

    x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    if name == "block_hadamard":
        rotate = cq.block_hadamard
        return lambda: rotate(x, 32)
    if name == "quantize":
        quantize, spec = cq.quantize, cq.QuantSpec.parse("int4:token")
        return lambda: quantize(x, spec)
    if name == "gptq":
        gptq, spec, gram = cq.gptq, cq.QuantSpec.parse("int4:channel"), x.T.astype(float) @ x
        return lambda: gptq(x[:32], gram, spec)

    import corequant_transformers as cqhf
    from corequant.recipe import Recipe

    whole, model, recipe = cqhf.quantize, cqhf.tiny_model("llama"), Recipe(block_size=16)
    ids = np.random.default_rng(0).integers(0, 100, (4, 32))
    return lambda: whole(model, recipe, ids)


def entered(call: Callable[[], Any]) -> list[str]:
    """Return the product's files whose functions a call enters, from its packages' folders on."""
    seen: set[str] = set()

    def hook(frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name not in seen and not _imports(frame):
            seen.add(name)

    threading.setprofile(hook)
    sys.setprofile(hook)
    call()
    sys.setprofile(None)
    roots = {
        Path(module.__file__).parent
        for name, module in sys.modules.items()
        if name.startswith("corequant") and "." not in name and module.__file__
    }
    files = {Path(name): root for name in seen for root in roots if Path(name).is_relative_to(root)}
    return sorted(str(file.relative_to(root.parent)) for file, root in files.items())


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals["__name__"] != "__main__":
            return True
        frame = frame.f_back
    return False


def counted(name: str) -> list[str]:
    """Return the files that a call enters in a new process."""
    command = [sys.executable, __file__, "--call", name]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder} if name in COLD else None
        for _ in range(1 if name in COLD else 2):
            done = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
    return done.stdout.split()


def main() -> int:
    """Print the count of each call, and return 1 if one is beyond its limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(LIMITS)}")
    parser.add_argument("--list", action="store_true", help="also print the files")
    parser.add_argument("--call", choices=LIMITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        print(*entered(prepared(arguments.call)), sep="\n")
        return 0
    beyond = False
    for name in arguments.names or LIMITS:
        files = counted(name)
        beyond |= len(files) > LIMITS[name]
        print(f"{name}: {len(files)} files (at most {LIMITS[name]})")
        if arguments.list:
            print(*(f"    {file}" for file in files), sep="\n")
    return int(beyond)


if __name__ == "__main__":
    sys.exit(main())

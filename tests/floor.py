"""Print the oldest versions that pyproject.toml declares, as constraints for pip.

Usage: python tests/floor.py [PACKAGE==VERSION ...]

A version that is given stands in the place of the declared one, for what can't be installed here.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("torch", "transformers", "plot", "data")


def floors(project: dict, instead: list[str]) -> dict[str, str]:
    """Return the least version of each package that users install."""
    declared = list(project["dependencies"])
    for extra in EXTRAS:
        declared += project["optional-dependencies"][extra]
    found = dict(re.match(r"([\w-]+)>=([\w.]+)$", d).groups() for d in declared if ">=" in d)
    return found | dict(given.split("==") for given in instead)


def main() -> None:
    file = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    for package, version in sorted(floors(project, sys.argv[1:]).items()):
        print(f"{package}=={version}")


if __name__ == "__main__":
    main()

"""The ``corequant`` command as ``python -m corequant``."""

from corequant.cli import main

if __name__ == "__main__":
    main()

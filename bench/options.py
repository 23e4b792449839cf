"""The options that scripts about a model's perplexity share."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["parser_for"]


def parser_for(description: str) -> argparse.ArgumentParser:
    """Return a parser that knows a model, its two texts, and where cells are kept and written."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="a directory or a GGUF file")
    parser.add_argument("--calibration", required=True, type=Path, help="text to calibrate on")
    parser.add_argument("--text", required=True, type=Path, help="text to measure perplexity on")
    parser.add_argument("--json", required=True, type=Path, help="finished cells; not run again")
    parser.add_argument("--write", action="store_true", help="write tables to bench/README.md")
    return parser

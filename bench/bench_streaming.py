"""A real model from its files, block by block, against the same model in memory.

Usage: python bench/bench_streaming.py --model M --text T [--folder F] [--write]

M is SmolLM2-135M-Instruct as GGUF; it is written as a directory in several files first. Both runs
must end in the same bytes. From the log of the run on files: how far the estimate of the remaining
time was off when half of the time had passed. ``--write`` puts it into bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from markdown import write_section

import corequant_transformers as cqhf
from corequant.recipe import Recipe

RECIPES = {
    "nearest": Recipe(block_size=16, samples=8, sequence_length=512),
    "qronos": Recipe(block_size=16, samples=4, sequence_length=256, rounding="qronos"),
}
FILES = ("corequant.safetensors", "recipe.toml")


def half_way(log: Path) -> tuple[str, float, float, float]:
    """Return the step that ended after half of the time, the estimate, the truth, the total."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    passed, total = 0.0, sum(e["seconds"] for e in events)
    for event in events:
        passed += event["seconds"]
        if passed >= total / 2 and event["remaining_seconds"] is not None:
            return event["step"], event["remaining_seconds"], total - passed, total
    raise SystemExit("the log ends before half of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--folder", type=Path, help="for 1.5 GB; a temporary one")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    source = cqhf.Source(options.model)
    model, tokenizer = source.load(), source.tokenizer()
    text = options.text.read_text(encoding="utf-8")
    rows = [
        "| rounding | bytes as in memory | half-way at | estimate, s | truth, s | off by |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model.save_pretrained(folder / "float", max_shard_size="100MB")
        tokenizer.save_pretrained(folder / "float")
        for label in options.recipes.split(","):
            recipe = RECIPES[label]
            tokens = cqhf.token_windows(text, tokenizer, recipe.sequence_length, recipe.samples)
            disk, memory = folder / f"{label}-disk", folder / f"{label}-memory"
            cqhf.quantize(folder / "float", recipe, tokens, disk)
            step, estimate, truth, total = half_way(disk / "log.jsonl")
            print(label, step, estimate, truth, total, flush=True)
            cqhf.quantize(model, recipe, tokens, memory)
            for file in FILES:
                if (disk / file).read_bytes() != (memory / file).read_bytes():
                    raise SystemExit(f"{file} differs between disk and memory")
            rows.append(
                f"| {label} | yes | {step} | {estimate:.0f} | {truth:.0f} | "
                f"{abs(estimate / truth - 1):.0%} |"
            )
            print(rows[-1], flush=True)
    body = [
        "## Streaming",
        "",
        f"Written by `bench_streaming.py`: {options.model.stem} from several files, against the "
        "model in memory, and the time that was estimated to remain when half of it had passed "
        "(allowed: off by 25 %).",
        "",
        *rows,
    ]
    if options.write:
        write_section("streaming", "\n".join(body))


if __name__ == "__main__":
    main()

"""Qronos on a whole model, on one core, against brevitas's own program: seconds and memory.

Usage: python bench/bench_qronos.py --model M --calibration C --text T --json J [--folder F]
       [--sides corequant,brevitas] [--write]

M is SmolLM2-135M-Instruct as GGUF. It is written to F in float32 first, with the calibration
windows; then each side reads it there, in a process of its own on the first processor that this one
may use: W4A4, blocks of 32 at down_proj with MassDiff, a merged rotation of the residual stream,
columns in the order of their inputs, scales as each finds them by default. Perplexity is that of
the same windows. brevitas's program needs ``pip install datasets``, which it imports and doesn't
use here. What a side took is kept in J, so that one can be run again; ``--write`` puts the table
into bench/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from markdown import write_section
from options import parser_for

SAMPLES, LENGTH, BLOCK, DAMPING = 8, 2048, 32, 1e-3
THREADS = ("OMP", "MKL", "OPENBLAS", "NUMBA")
SIDES = ("corequant", "brevitas")
LIMITS = {"seconds of Qronos": 0.2, "peak RSS": 0.6, "perplexity": 1.02}


def corequant(folder: Path) -> tuple[Callable[[], object], dict[str, float]]:
    """Quantize what is in the folder; return what gives the model, and the seconds."""
    import corequant_transformers as cqhf
    from corequant.recipe import Recipe

    recipe = Recipe(block_size=BLOCK, samples=SAMPLES, rounding="qronos", damping=DAMPING)
    begun = time.monotonic()
    made = cqhf.quantize(folder / "float", recipe, windows(folder), folder / "quantized")
    passed = time.monotonic() - begun
    log = (folder / "quantized" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in log]
    rounding = sum(s["seconds"] for s in steps if s["step"].startswith("block"))
    return lambda: made.model, {"all": passed, "qronos": rounding}


def compile_kernels() -> None:
    """Leave no compiling to the run that is measured, as after a first model."""
    import corequant_transformers as cqhf
    from corequant.recipe import Recipe

    tokens = np.random.default_rng(0).integers(0, 128, (2, 64))
    cqhf.quantize(cqhf.tiny_model("llama"), Recipe(block_size=BLOCK, rounding="qronos"), tokens)


def brevitas(folder: Path) -> tuple[Callable[[], object], dict[str, float]]:
    """Let brevitas's program do the same, from the same windows."""
    import brevitas_examples.llm.main as program
    from brevitas_examples.llm.llm_quant import gpxq

    tokens = windows(folder)
    program.get_dataset_for_model = lambda **_: [{"input_ids": w[None]} for w in tokens]
    # Blocks are sent to a GPU.
    gpxq.send_to_device = lambda x, device: x
    seconds = {}

    def timed(*args, inner=program.apply_qronos, **kwargs):
        begun = time.monotonic()
        inner(*args, **kwargs)
        seconds["qronos"] = time.monotonic() - begun

    program.apply_qronos = timed
    options = (
        f"--model {folder / 'float'} --dtype float32 --nsamples {SAMPLES} --seqlen {LENGTH} "
        "--weight-bit-width 4 --weight-quant-granularity per_channel --input-bit-width 4 "
        "--input-quant-granularity per_row --input-scale-type dynamic --quantize-input-zero-point "
        "--rotation fused_no_fx --replace-rmsnorm --rotation-orphan-sink "
        f"--rotation-block-size {BLOCK} --disable-block-rotation-for-fused --permute-fn massdiff "
        f"--qronos --qronos-alpha {DAMPING} --gpxq-act-order --gpxq-block-name model.layers"
    )
    begun = time.monotonic()
    _, model = program.quantize_llm(program.create_args_parser().parse_args(options.split()))
    return lambda: model, {"all": time.monotonic() - begun, **seconds}


def windows(folder: Path) -> np.ndarray:
    """Return the calibration windows."""
    return np.load(folder / "calibration.npy")


def run(side: str, place: str) -> None:
    """Print what one side takes, and the perplexity that it reaches."""
    folder = Path(place)
    import torch

    import corequant_transformers as cqhf
    from corequant_transformers.model.surroundings import peak_rss_mib

    torch.set_num_threads(1)
    load, seconds = {"corequant": corequant, "brevitas": brevitas}[side](folder)
    peak = peak_rss_mib()
    with torch.no_grad():
        perplexity = cqhf.evaluate(load(), np.load(folder / "test.npy")).perplexity
    print(json.dumps({**seconds, "peak": peak, "perplexity": perplexity}))


def measure(side: str, folder: Path) -> dict[str, float]:
    """Run one side on one processor."""
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, __file__, "--run", side, folder],
        env={**os.environ, **{f"{name}_NUM_THREADS": "1" for name in THREADS}},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(side, found, flush=True)
    return found


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Write the float model and the windows."""
    import corequant_transformers as cqhf

    source = cqhf.Source(options.model)
    tokenizer = source.tokenizer()
    source.load().save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    wanted = {
        "calibration": (options.calibration, SAMPLES),
        "test": (options.text, options.windows),
    }
    for name, (path, count) in wanted.items():
        text = path.read_text(encoding="utf-8")
        np.save(folder / name, cqhf.token_windows(text, tokenizer, LENGTH, count))


def report(found: dict[str, dict[str, float]]) -> str:
    """Return the section of bench/README.md."""
    ours, peer = (found[side] for side in SIDES)
    ratios = {
        "seconds of Qronos": ours["qronos"] / peer["qronos"],
        "seconds in all": ours["all"] / peer["all"],
        "peak RSS": ours["peak"] / peer["peak"],
        "perplexity": ours["perplexity"] / peer["perplexity"],
    }
    rows = [
        f"| {side} | {f['qronos']:.0f} | {f['all']:.0f} | {f['peak']:.0f} | {f['perplexity']:.2f} |"
        for side, f in found.items()
    ]
    shares = ", ".join(f"{name} {_judged(name, ratio)}" for name, ratio in ratios.items())
    version = importlib.metadata.version("brevitas")
    return "\n".join(
        [
            "## Qronos on a whole model",
            "",
            "Written by `bench_qronos.py`: SmolLM2-135M-Instruct from float32 safetensors, W4A4, "
            f"blocks of {BLOCK} with MassDiff, {SAMPLES} windows of {LENGTH} tokens, one core; "
            f"brevitas {version} is its own program.",
            "",
            "| | Qronos, s | in all, s | peak RSS, MiB | perplexity |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Ours divided by brevitas's (allowed; missed in bold): {shares}.",
            "What takes the time: `docs/runs.md`.",
        ]
    )


def _judged(name: str, ratio: float) -> str:
    most = LIMITS.get(name)
    if most is None:
        return f"{ratio:.3f}"
    return f"{ratio:.3f} (≤ {most})" if ratio <= most else f"**{ratio:.3f}** (≤ {most})"


def main() -> None:
    if "--run" in sys.argv:
        run(*sys.argv[2:4])
        return
    if "--compile" in sys.argv:
        compile_kernels()
        return
    parser = parser_for(__doc__)
    parser.add_argument("--windows", default=10, type=int)
    parser.add_argument("--folder", type=Path, help="for 1 GB; a temporary one")
    parser.add_argument("--sides", default=",".join(SIDES))
    options = parser.parse_args()
    kept = options.json
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    subprocess.run([sys.executable, __file__, "--compile"], check=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        prepare(options, folder)
        for side in filter(None, options.sides.split(",")):
            found[side] = measure(side, folder)
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if len(found) == len(SIDES):
        print(report(found))
        if options.write:
            write_section("qronos", report(found))


if __name__ == "__main__":
    main()

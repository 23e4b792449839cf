"""Peak memory of quantizing random models of Llama's shape, against depth, vocabulary and a limit.

Usage: python bench/bench_memory.py [--folder F] [--json F] [--rows R;...] [--write]

Every run is a process of its own; its peak is what the system counted for it (VmHWM). The limited
run is the command with ``--memory`` (RLIMIT_DATA), inside a control group of the same size where
this process may make one: the group's limit also counts files' pages that are mapped or cached.
Needs about 5 GB of disk for a while. Every finished row is added to the JSON file; a later run goes
on from there. ``--write`` puts the table into bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from markdown import write_section

from corequant.recipe import Recipe
from corequant.storage.tensor_file import RawTensor, write_tensors

TEXT = "a b c d e f g h i j k l m n o p " * 40
NARROW = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64}
LAYERS = (4, 16, 64)
VOCABULARY = 128 * 1024
# Twice this is the wide model's file.
LIMIT = 1150
GROUP = Path("/sys/fs/cgroup/memory")


def write_model(folder: Path, layers: int, vocabulary: int = 256, **sizes: int) -> int:
    """Write a random Llama, a matrix at a time, and return the bytes of its weights."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=False,
        num_attention_heads=sizes["hidden_size"] // sizes["head_dim"],
        num_key_value_heads=sizes["hidden_size"] // sizes["head_dim"],
        max_position_embeddings=512, **sizes,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = {"[UNK]": 0} | {chr(96 + i): i for i in range(1, 27)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    d, m = sizes["hidden_size"], sizes["intermediate_size"]
    block = {
        **{f"self_attn.{n}_proj": (d, d) for n in "qkvo"},
        "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m),
    }  # fmt: skip
    generator, weight_map, total = np.random.default_rng(0), {}, 0

    def matrix(*shape: int) -> RawTensor:
        array = generator.standard_normal(shape, np.float32)
        array *= np.float32(shape[-1] ** -0.5)
        return RawTensor.of(array)

    def save(name: str, tensors: dict[str, RawTensor]) -> None:
        nonlocal total
        write_tensors(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(t.data.nbytes for t in tensors.values())

    ones = RawTensor.of(np.ones(d, np.float32))
    for i in range(layers):
        prefix = f"model.layers.{i}."
        tensors = {f"{prefix}{n}.weight": matrix(*shape) for n, shape in block.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ones
        save(f"block-{i}.safetensors", tensors)
    edges = {"model.embed_tokens.weight": matrix(vocabulary, d), "model.norm.weight": ones}
    save("entry.safetensors", edges)
    save("exit.safetensors", {"lm_head.weight": matrix(vocabulary, d)})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def child(arguments: list[str]) -> None:
    """Quantize as told, and print the peak and the plan in MiB."""
    import corequant_transformers as cqhf
    from corequant_transformers.model.surroundings import peak_rss_mib

    model, output, fields = Path(arguments[0]), Path(arguments[1]), json.loads(arguments[2])
    recipe = Recipe(**fields)
    cqhf.quantize(model, recipe, TEXT, output)
    print(peak_rss_mib(), cqhf.plan(model, recipe).cost()["peak_mib"])


def measure(model: Path, output: Path, fields: dict) -> tuple[float, float, float]:
    """Quantize in a process of its own; return peak and plan in MiB, and seconds."""
    started = time.monotonic()
    command = [sys.executable, __file__, "--child", str(model), str(output), json.dumps(fields)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(output)
    peak, planned = map(float, done.stdout.split())
    return peak, planned, time.monotonic() - started


@contextmanager
def group(limit: int):
    """Give a command's beginning that runs it in a control group of so many MiB, if there is one.

    Version 1 of the system's interface, or nothing.
    """
    folder = GROUP / f"corequant-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit * 2**20))
        yield folder
    finally:
        folder.rmdir()


def limited(model: Path, output: Path, limit: int) -> tuple[dict, float, bool]:
    """Run the command under a limit; return its report, its seconds, and whether in a group."""
    command = [
        Path(sys.executable).with_name("corequant"), "quantize", model, "-o", output,
        "--calibration", model / "text.txt", "--samples", "2", "--sequence-length", "128",
        "--block-size", "32", "--memory", f"{limit}MiB", "--json",
    ]  # fmt: skip
    (model / "text.txt").write_text(TEXT)
    started = time.monotonic()
    with group(limit) as folder:

        def enter() -> None:
            if folder is not None:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            [str(c) for c in command], stdout=subprocess.PIPE, text=True, check=True,
            preexec_fn=enter,
        )  # fmt: skip
    shutil.rmtree(output)
    return json.loads(done.stdout), time.monotonic() - started, folder is not None


def rows() -> dict[str, tuple[int, int, dict[str, int], str]]:
    """Return layers, vocabulary, sizes and rounding of each row, by its name."""
    found = {f"{n} layers": (n, 256, NARROW, "nearest") for n in LAYERS}
    found["4 layers, qronos"] = (4, 256, NARROW, "qronos")
    found[f"2 layers, {VOCABULARY} tokens"] = (2, VOCABULARY, NARROW, "nearest")
    return found | {"limited": (36, 256, WIDE, "nearest")}


def run(name: str, folder: Path) -> dict:
    """Make the model of a row and measure it."""
    layers, vocabulary, sizes, rounding = rows()[name]
    model, output = folder / "model", folder / "out"
    found = {"name": name, "weights": write_model(model, layers, vocabulary, **sizes) / 2**20}
    if name == "limited":
        done, seconds, grouped = limited(model, output, LIMIT)
        found |= {"peak": done["peak_rss_mib"], "limit": LIMIT, "group": grouped}
    else:
        fields = {"block_size": 32, "samples": 2, "sequence_length": 128, "rounding": rounding}
        found["peak"], found["planned"], seconds = measure(model, output, fields)
    shutil.rmtree(model)
    return {**found, "seconds": round(seconds)}


def report(found: dict[str, dict]) -> str:
    table = [
        "| model | weights, MiB | peak, MiB | planned, MiB | peak / planned | s |",
        "|---|---|---|---|---|---|",
    ]
    plain = [row for name, row in found.items() if name != "limited"]
    for row in plain:
        table.append(
            f"| {row['name']} | {row['weights']:.0f} | {row['peak']:.0f} | {row['planned']:.0f} | "
            f"{row['peak'] / row['planned']:.2f} | {row['seconds']} |"
        )
    flat = [found[f"{n} layers"]["peak"] for n in LAYERS]
    body = [
        "## Memory",
        "",
        "Written by `bench_memory.py`: random models of Llama's shape in float32, hidden 512, "
        "intermediate 2048, 256 tokens of calibration; rounded to nearest unless it is said.",
        "",
        *table,
        "",
        f"Depth changes the peak by {max(flat) / min(flat) - 1:.1%} (allowed: 10 %); the largest "
        f"peak is {max(row['peak'] / row['planned'] for row in plain):.2f} of what `plan` said "
        "(allowed: 1.2).",
    ]
    if "limited" in found:
        row = found["limited"]
        enforced = "RLIMIT_DATA and a control group" if row["group"] else "RLIMIT_DATA"
        body += [
            "",
            f"`--memory {row['limit']}MiB`, enforced by {enforced}: a model of "
            f"{row['weights']:.0f} MiB (36 layers, hidden 1024, intermediate 4096), "
            f"{row['weights'] / row['limit']:.2f} times the limit, was quantized in "
            f"{row['seconds']} s with a peak of {row['peak']} MiB.",
        ]
    return "\n".join(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where models are made; a temporary one")
    parser.add_argument("--json", type=Path, help="where finished rows are kept")
    parser.add_argument("--rows", default=";".join(rows()))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    lines = options.json.read_text().splitlines() if options.json and options.json.exists() else []
    found = {row["name"]: row for row in map(json.loads, lines)}
    for name in options.rows.split(";"):
        if name in found:
            continue
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[name] = run(name, Path(folder))
        print(found[name], flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(found[name]) + "\n")
    if options.write:
        write_section("memory", report({name: found[name] for name in rows() if name in found}))


if __name__ == "__main__":
    main()

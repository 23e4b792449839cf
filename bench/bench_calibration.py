"""What permutations add to a calibration pass, and what they cost at the largest widths.

Usage: python bench/bench_calibration.py [--model M --calibration valid.txt]

With a model: seconds of a float forward pass over calibration windows, of the same pass with the
second-order statistic of every ``down_proj`` collected, and of choosing all permutations from it;
the share that is added, over as many windows as a recipe takes by default. Passes with and without
statistics alternate. Without a model: seconds and peak memory of the permutations at d = 14336 and
b = 16, the statistic excluded. ``--write`` puts the numbers into bench/README.md.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from functools import partial
from pathlib import Path

import numpy as np
from markdown import write_section

import corequant as cq
from corequant.recipe import Recipe

WIDTH, BLOCK, TOKENS = 14336, 16, 512


def timed(function, clock=time.perf_counter):
    """Return what a function returns, and how long it took."""
    started = clock()
    result = function()
    return result, clock() - started


def added(model_path: Path, text: str, rounds: int) -> list[str]:
    """Return lines about one calibration pass of a real model."""
    import torch
    from choices import choose_all

    import corequant_transformers as cqhf

    source = cqhf.Source(model_path)
    model = source.load()
    recipe = Recipe(block_size=BLOCK, permutation="energydiff")
    windows = cqhf.token_windows(text, source.tokenizer(), recipe.sequence_length, recipe.samples)
    plan = cqhf.plan(model, recipe)

    def plain(tokens=windows):
        with torch.no_grad():
            for window in torch.from_numpy(tokens):
                model.model(input_ids=window[None], use_cache=False)

    def collect(tokens=windows):
        return cqhf.calibrate(model, recipe, tokens)

    # Compiles, and warms caches.
    few = windows[:2, :64]
    plain(few), choose_all(plan, collect(few), lambda name: np.empty(0))
    passes, statistics = [], []
    for _ in range(rounds):
        passes.append(timed(plain)[1])
        data, seconds = timed(collect)
        statistics.append(seconds)
    _, choosing = timed(lambda: choose_all(plan, data, lambda name: np.empty(0)))
    forward, with_statistics = float(np.median(passes)), float(np.median(statistics))
    share = (with_statistics - forward) / forward
    whole = share + choosing / forward
    return [
        f"SmolLM2-135M, 30 layers of {plan.dimensions.intermediate}, blocks of {BLOCK}: a forward "
        f"pass over {windows.size} tokens {forward:.1f} s, with statistics {with_statistics:.1f} s "
        f"({share:+.1%}), choosing 30 permutations {choosing:.2f} s: all of it adds {whole:.1%}.",
    ]


def wide(clock) -> list[str]:
    """Return lines about the permutations of a wide layer."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, WIDTH)).astype(np.float32)
    x *= np.exp(rng.normal(0, 1.5, WIDTH)).astype(np.float32)
    # Groups of channels that are loud in the same tokens.
    x *= np.repeat(1 + 4 * (rng.random((2048, 64)) < 0.2), WIDTH // 64, axis=1).astype(np.float32)
    empty = cq.ActivationStats(WIDTH, energy_gram=True)
    stats, statistic = timed(partial(empty.update, x), clock)
    gram, tokens, mean_abs = stats.energy_gram, x[:TOKENS].copy(), stats.mean_abs
    del x, stats, empty
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    small = np.eye(32, dtype=np.float32)
    cq.energydiff(small, 8), cq.rangediff(small, 8, proposals=1), cq.sign_descent(small, 8)
    rows = [
        "| d = 14336, b = 16 | s |",
        "|---|---|",
        f"| statistic, 2048 tokens | {statistic:.1f} |",
    ]
    _, seconds = timed(lambda: cq.massdiff(mean_abs, BLOCK), clock)
    rows.append(f"| MassDiff | {seconds:.2f} |")
    _, seconds = timed(lambda: cq.energydiff(gram, BLOCK, refine=0), clock)
    rows.append(f"| second order | {seconds:.1f} |")
    p, seconds = timed(lambda: cq.energydiff(gram, BLOCK), clock)
    rows.append(f"| second order, refined | {seconds:.1f} |")
    _, seconds = timed(lambda: cq.rangediff(tokens, BLOCK, start=p), clock)
    rows.append(f"| range search, {TOKENS} tokens | {seconds:.1f} |")
    _, seconds = timed(lambda: cq.sign_descent(tokens[:, p], BLOCK), clock)
    rows.append(f"| signs, {TOKENS} tokens | {seconds:.1f} |")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = gram.nbytes / 2**30
    rows += [
        "",
        f"Peak memory of the process {after / 2**20:.2f} GiB, of which the statistic itself is "
        f"{held:.2f} GiB; making the statistic peaked at {before / 2**20:.2f} GiB.",
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="of the process, on a busy machine")
    parser.add_argument("--write", action="store_true", help="write to bench/README.md")
    o = parser.parse_args()
    clock = time.process_time if o.cpu_time else time.perf_counter
    if o.model:
        name, lines = "calibration", added(o.model, o.calibration.read_text("utf-8"), o.rounds)
        title = "## Time of calibration"
    else:
        name, lines, title = "wide", wide(clock), "## A wide layer"
    lines = [title, "", f"Written by `bench_calibration.py`, {platform.machine()}.", "", *lines]
    print("\n".join(lines))
    if o.write:
        write_section(name, "\n".join(lines))


if __name__ == "__main__":
    main()

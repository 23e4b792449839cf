"""Products and causal attention of float32 CPU tensors, beside torch's own.

Usage: python bench/bench_products.py [--rounds 9] [--write]

One pinned thread, shapes of SmolLM2-135M for a window of 2048 tokens. Candidates take turns,
forwards and backwards; figures are medians of thread CPU time. Both are compared with float64
first: relative errors in the Frobenius norm.
"""

from __future__ import annotations

import argparse

from bench_rotation import described, table  # sets the number of threads
from bench_torch import medians
from markdown import write_section

# ruff: isort: split
import torch
from rotation_parts import pin

from corequant_torch.device.grams import token_products
from corequant_torch.device.onednn import causal_attention, linear, multiplies_quickly

TOKENS, HIDDEN, INNER, HEADS, KEY_HEADS, WIDTH = 2048, 576, 1536, 9, 3, 64
F = torch.nn.functional


def candidates():
    """Yield what is computed, ours and torch's, as functions of a list of tensors, and these."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    for d, out in ((HIDDEN, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN)):
        yield f"x Wᵀ, {d} to {out}", linear, F.linear, [normal(TOKENS, d), normal(out, d)]
    for d in (HIDDEN, INNER):
        x, y = normal(TOKENS, d), normal(TOKENS, d)
        yield f"xᵀy, {d}", lambda x, y: token_products(x, y, False), lambda x, y: x.T @ y, [x, y]
        yield f"xᵀx, {d}", lambda x: token_products(x, None, False), lambda x: x.T @ x, [x]
    q = normal(1, HEADS, TOKENS, WIDTH)
    k, v = (normal(1, KEY_HEADS, TOKENS, WIDTH) for _ in range(2))

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    yield (
        f"causal attention, {HEADS} heads of {WIDTH}",
        lambda q, k, v: causal_attention(q, k, v, None),
        theirs,
        [q, k, v],
    )


def error(found, expected) -> str:
    return f"{float((found.double() - expected).norm() / expected.norm()):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write bench/README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pin()
    rows = []
    for name, ours, theirs, given in candidates():
        expected = theirs(*(t.double() for t in given))
        jobs = {"ours": lambda f=ours, g=given: f(*g), "torch": lambda f=theirs, g=given: f(*g)}
        errors = [error(job(), expected) for job in jobs.values()]
        t = medians(jobs, options.rounds)
        times = [f"{t[side] * 1e3:.1f}" for side in jobs]
        rows.append([name, *times, f"{t['torch'] / t['ours']:.2f}", *errors])
        print(*rows[-1], sep=" | ", flush=True)
    if not options.write:
        return
    x = torch.zeros(TOKENS, HIDDEN)
    how = "by oneDNN" if multiplies_quickly(x, torch.zeros(INNER, HIDDEN)) else "torch's own"
    body = [
        "## Products of CPU tensors\n",
        f"Written by `bench_products.py`: {TOKENS} tokens, float32, one thread, medians of thread "
        f"CPU time; ours are {how} here.\n",
        f"{described()}\n",
        table(["", "ms", "ms, torch", "times faster", "error", "error, torch"], rows),
    ]
    write_section("products", "\n".join(body))


if __name__ == "__main__":
    main()

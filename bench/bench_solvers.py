"""GPTQ, Qronos and GPFQ on one layer, against brevitas's: losses first, then times.

Usage: python bench/bench_solvers.py [--rows 2048] [--d 8192] [--rounds 2] [--methods gptq,qronos]
       [--write]

Rounds alternate between the two; each row gives the medians and the median of the rounds' ratios,
of elapsed time and of processor time, and how much memory each takes beyond its arguments, in a
process of its own. The peer's GPFQ takes hours at d = 8192; try d = 1024. ``--write`` puts the
table into bench/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import resource
import statistics
import subprocess
import sys
import time
import warnings

import numpy as np
import torch
from markdown import write_section

import corequant as cq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import brevitas.nn as qnn
    from brevitas.graph.gpfq import GPFQ
    from brevitas.graph.gptq import GPTQ
    from brevitas.graph.qronos import Qronos
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8WeightPerChannelFloat

SPEC = "int4:channel"
ALPHA = 1e-3


def problem(rows, d, tokens):
    """Inputs with heavy-tailed channels, some correlation, and noise from quantization."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(tokens, d)).astype(np.float32)
    x *= np.exp(generator.normal(0, 0.5, d)).astype(np.float32)
    x[:, 1:] += 0.5 * x[:, :-1]
    noise = generator.normal(size=x.shape).astype(np.float32)
    q = x + 0.1 * noise * x.std(0)
    W = (generator.normal(size=(rows, d)) / np.sqrt(d)).astype(np.float32)
    return W, q.T @ q / np.float32(tokens), x.T @ q / np.float32(tokens)


def peer(name, W, H, G):
    """Return a call that rounds a fresh layer with our scales, and the layer."""
    kind = {"gptq": GPTQ, "qronos": Qronos, "gpfq": GPFQ}[name]
    layer = qnn.QuantLinear(
        W.shape[1],
        W.shape[0],
        bias=False,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=4,
        weight_narrow_range=False,
        weight_scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS,
    )
    layer.weight.data = torch.from_numpy(W.copy())
    layer.quant_weight()
    layer.eval()
    scales, _ = cq.choose_qparams(W, SPEC)
    with torch.no_grad():
        (parameter,) = layer.weight_quant.parameters()
        parameter.copy_(torch.from_numpy(scales * 8).reshape(parameter.shape))
    blocks = {} if kind is GPFQ else {"num_blocks": 100}
    solver = kind(layer, "layer", True, 1, True, **blocks)
    solver.B = None
    solver.H = torch.from_numpy(H.copy())[None]
    if name == "qronos":
        solver.alpha = ALPHA
    if name != "gptq":
        solver.G = torch.from_numpy((G if name == "qronos" else G.T).copy())[None]
    return solver.single_layer_update, layer


def ours(name, W, H, G):
    if name == "gptq":
        return cq.gptq(W, H, SPEC, losses=False)
    if name == "qronos":
        return cq.qronos(W, H, G, SPEC, damping=ALPHA, losses=False)
    return cq.gpfq(W, H, G, SPEC, losses=False)


def timed(call):
    elapsed, busy = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - elapsed, time.process_time() - busy


def resident():
    """Return what is resident now and what was at most, in MiB."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * resource.getpagesize() / 2**20
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def peak(side, name, W, H, G):
    """Run one side once and print how much memory it took beyond its arguments, in MiB."""
    if side == "corequant":
        ours(name, W[:4, :64].copy(), H[:64, :64].copy(), G[:64, :64].copy())  # compile
        before = resident()[0]
        ours(name, W, H, G)
    else:
        update, _ = peer(name, W, H, G)
        # The peer's copies of H and G are its arguments, which it overwrites.
        before = resident()[0]
        with torch.no_grad():
            update()
    print(round(resident()[1] - before))


def measured_peak(side, name, o):
    """Return what ``peak`` prints in a process of its own."""
    shape = ("--rows", str(o.rows), "--d", str(o.d), "--tokens", str(o.tokens))
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--memory",
        side,
        "--methods",
        name,
        *shape,
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--d", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=0, help="as many as d by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", default="gptq,qronos")
    parser.add_argument("--memory", choices=["corequant", "brevitas"], help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the table to bench/README.md")
    o = parser.parse_args()
    W, H, G = problem(o.rows, o.d, o.tokens or o.d)
    if o.memory:
        peak(o.memory, o.methods, W, H, G)
        return
    lines = [
        f"| {o.rows} × {o.d} | corequant, s | brevitas, s | ratio | of processor time | losses | "
        "corequant, MiB | brevitas, MiB |",
        "|" + "---|" * 8,
    ]
    print("\n".join(lines))
    for name in o.methods.split(","):
        ours(name, W[:4, :64].copy(), H[:64, :64].copy(), G[:64, :64].copy())  # compile
        mine, theirs = [], []
        for _ in range(o.rounds):
            rounded, *seconds = timed(lambda name=name: ours(name, W, H, G))
            mine.append(seconds)
            update, layer = peer(name, W, H, G)
            with torch.no_grad():
                _, *seconds = timed(update)
                values = layer.quant_weight().value.numpy()
            theirs.append(seconds)
            del update
        cross = None if name == "gptq" else G
        losses = [cq.reconstruction_loss(W, q, H, cross) for q in (rounded, values)]
        slack = 0.001 * abs(cq.reconstruction_loss(W, values, H))
        assert losses[0] <= losses[1] + slack, losses
        wall = [statistics.median(row[0] for row in side) for side in (mine, theirs)]
        ratios = [
            statistics.median(b[k] / a[k] for a, b in zip(mine, theirs, strict=True))
            for k in (0, 1)
        ]
        peaks = [measured_peak(side, name, o) for side in ("corequant", "brevitas")]
        lines.append(
            f"| {name} | {wall[0]:.1f} | {wall[1]:.1f} | {ratios[0]:.1f} | {ratios[1]:.1f} | "
            f"{losses[0] / losses[1]:.4f} | {peaks[0]} | {peaks[1]} |"
        )
        print(lines[-1], flush=True)
    if o.write:
        write_section("solvers", "\n".join(["## Solvers", "", _caption(), "", *lines]))


def _caption() -> str:
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("numpy", "torch", "brevitas")]
    return (
        f"Written by `bench_solvers.py`: one layer, INT4 by channel, {torch.get_num_threads()} "
        f"thread(s), {', '.join(versions)}. Memory is what each takes beyond its arguments, which "
        "brevitas overwrites; losses are corequant's divided by brevitas's."
    )


if __name__ == "__main__":
    main()

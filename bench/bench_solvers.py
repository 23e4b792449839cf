"""GPTQ, Qronos and GPFQ on one layer, against other libraries': losses first, then times.

Usage: python bench/bench_solvers.py [--rows 2048] [--d 8192] [--rounds 2]
       [--methods gptq,gptq:llmcompressor,qronos] [--write]

A method's peer is brevitas's, or GPTQ's llm-compressor's (``pip install --no-deps llmcompressor
loguru`` and ``pip install datasets``: what else it asks for contradicts the peers extra, and isn't
needed here).

Rounds alternate between the two; each row gives the medians and the median of the rounds' ratios,
of elapsed time and of processor time, and how much memory each takes beyond its arguments, in a
process of its own. brevitas's GPFQ takes hours at d = 8192; try d = 1024. ``--write`` puts the
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
SIDES = ("corequant", "peer")
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
    """Return a call that rounds copies with our scales, and what gives its values then."""
    name, _, library = name.partition(":")
    if library == "llmcompressor":
        return compressor(W, H)
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
    return solver.single_layer_update, lambda: layer.quant_weight().value.numpy()


def compressor(W, H):
    """The same of llm-compressor's GPTQ; H is damped by as much as ours."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    order = QuantizationArgs(num_bits=4, strategy="channel", symmetric=True, actorder="weight")
    scales = torch.from_numpy(cq.choose_qparams(W, SPEC)[0])[None]
    weights, hessians = (torch.from_numpy(a.copy())[None] for a in (W, H))
    found = []

    def update():
        zeros = torch.zeros_like(scales)
        found.append(quantize_weight(weights, hessians, scales, zeros, None, order)[0][0])

    return update, lambda: found[0].numpy()


def ours(name, W, H, G):
    name = name.partition(":")[0]
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
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(found.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--d", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=0, help="four times d by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", default="gptq,qronos")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the table to bench/README.md")
    o = parser.parse_args()
    W, H, G = problem(o.rows, o.d, o.tokens or 4 * o.d)
    if o.memory:
        peak(o.memory, o.methods, W, H, G)
        return
    lines = [
        f"| {o.rows} × {o.d} | peer | corequant, s | peer, s | ratio | of processor time | "
        "losses | corequant, MiB | peer, MiB |",
        "|" + "---|" * 9,
    ]
    print("\n".join(lines))
    for name in o.methods.split(","):
        ours(name, W[:4, :64].copy(), H[:64, :64].copy(), G[:64, :64].copy())  # compile
        mine, theirs = [], []
        for _ in range(o.rounds):
            rounded, *seconds = timed(lambda name=name: ours(name, W, H, G))
            mine.append(seconds)
            update, result = peer(name, W, H, G)
            with torch.no_grad():
                _, *seconds = timed(update)
                values = result()
            theirs.append(seconds)
            del update, result
        cross = None if name.startswith("gptq") else G
        losses = [cq.reconstruction_loss(W, q, H, cross) for q in (rounded, values)]
        slack = 0.001 * abs(cq.reconstruction_loss(W, values, H))
        assert losses[0] <= losses[1] + slack, losses
        wall = [statistics.median(row[0] for row in side) for side in (mine, theirs)]
        ratios = [
            statistics.median(b[k] / a[k] for a, b in zip(mine, theirs, strict=True))
            for k in (0, 1)
        ]
        peaks = [measured_peak(side, name, o) for side in SIDES]
        method, _, library = name.partition(":")
        lines.append(
            f"| {method} | {library or 'brevitas'} | {wall[0]:.1f} | {wall[1]:.1f} | "
            f"{ratios[0]:.1f} | {ratios[1]:.1f} | {losses[0] / losses[1]:.4f} | "
            f"{peaks[0]} | {peaks[1]} |"
        )
        print(lines[-1], flush=True)
    if o.write:
        caption = _caption(o.methods)
        write_section("solvers", "\n".join(["## Solvers", "", caption, "", *lines]))


def _caption(methods) -> str:
    names = ["numpy", "torch", "brevitas"] + ["llmcompressor"] * ("llmcompressor" in methods)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return (
        f"Written by `bench_solvers.py`: one layer, INT4 by channel, {torch.get_num_threads()} "
        f"thread(s), {', '.join(versions)}. Memory is what each takes beyond its arguments, which "
        "the peers overwrite; losses are corequant's divided by the peer's."
    )


if __name__ == "__main__":
    main()

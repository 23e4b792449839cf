"""Speed of the number formats against np.copyto, compressed-tensors and brevitas.

Usage: python bench/bench_formats.py [--size 4096] [--rounds 9] [--threads 1] [--peers] [--write]

``--write`` puts the tables, with the targets beside the figures, into bench/README.md.
Prints medians over rounds in which all candidates take turns, as ratios to the baseline of the same
rounds: copying the array, or writing the output. Results are compared before they are timed. With
one thread the clock is the thread's CPU time, which leaves out what other programs stole; with more
it is the wall's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from markdown import write_section

Candidates = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default=4096, type=int)
    parser.add_argument("--rounds", default=9, type=int)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the tables to bench/README.md")
    options = parser.parse_args()
    os.environ["NUMBA_NUM_THREADS"] = str(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter

    generator = np.random.default_rng(0)
    x = generator.standard_normal((options.size, options.size), dtype=np.float32)
    groups = {
        "round, against np.copyto": (ours_rounding(x), "np.copyto"),
        "read packed codes, against writing": (ours_reading(x), "write"),
        "search scales, against absmax": (ours_searching(x), "absmax"),
    }
    if options.peers:
        groups["the same as peers"] = (peers(x, options.threads), None)
    tables = []
    for title, (candidates, baseline) in groups.items():
        print(f"\n{title} ({options.size} x {options.size} float32, {options.threads} thread(s))")
        rows = report(candidates, baseline, options.rounds, clock)
        tables.append(markdown_table(title, rows))
    if options.write:
        size = f"float32 {options.size} × {options.size}, {options.threads} thread(s)"
        head = f"## Formats\n\nWritten by `bench_formats.py`; {size}; {described()}"
        write_section("formats", "\n\n".join([head, *tables]))


def ours_rounding(x: np.ndarray) -> Candidates:
    import corequant as cq

    out = np.empty_like(x)
    packed = np.zeros((len(x), x.shape[1] // 2), np.uint8)
    codes = cq.quantize(x, "mxfp4").codes
    np.testing.assert_array_equal(
        cq.quantize_packed(x, "mxfp4", out=packed).packed, cq.pack_bytes(codes, 4)
    )
    candidates: Candidates = {"np.copyto": lambda: np.copyto(out, x)}
    for text in ("int4:group128", "int4:group32", "int4:channel", "int4:token:asymmetric"):
        decoded = cq.dequantize(cq.quantize(x, text))
        np.testing.assert_array_equal(cq.fake_quantize(x, text), decoded)
        candidates[f"fake_quantize {text}"] = lambda text=text: cq.fake_quantize(x, text, out=out)
    for text in ("mxfp4", "nvfp4"):
        candidates[f"quantize_packed {text}"] = lambda text=text: cq.quantize_packed(
            x, text, out=packed
        )
    divisor = cq.choose_global_scale(x, "nvfp4")
    candidates["quantize_packed nvfp4, global scale given"] = lambda: cq.quantize_packed(
        x, "nvfp4", out=packed, global_scale=divisor
    )
    return candidates


def ours_reading(x: np.ndarray) -> Candidates:
    import corequant as cq

    out = np.empty_like(x)
    candidates: Candidates = {"write": lambda: out.fill(1)}
    for text in ("mxfp4", "nvfp4", "int4:group128"):
        packed = cq.quantize_packed(x, text)
        expected = cq.dequantize(cq.quantize(x, text))
        np.testing.assert_array_equal(cq.dequantize_packed(packed), expected)
        candidates[f"dequantize_packed {text}"] = lambda packed=packed: cq.dequantize_packed(
            packed, out=out
        )
    return candidates


def ours_searching(x: np.ndarray) -> Candidates:
    import corequant as cq

    rows = np.ascontiguousarray(x[: len(x) // 4])
    errors = {}
    for search in ("absmax", "mse", "exact"):
        rounded = cq.dequantize(cq.quantize(rows, f"int4:channel:{search}"))
        errors[search] = np.square(rows.astype(np.float64) - rounded).sum()
    assert errors["exact"] <= errors["mse"] <= errors["absmax"]
    candidates: Candidates = {}
    for search in ("absmax", "mse", "exact"):
        text = f"int4:channel:{search}"
        candidates[search] = lambda text=text: cq.choose_qparams(rows, text)
    candidates["absmax, codes too"] = lambda: cq.quantize(rows, "int4:channel")
    return candidates


def peers(x: np.ndarray, threads: int) -> Candidates:
    """compressed-tensors and brevitas on the CPU; results are equal where rules are."""
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import (
        pack_fp4_to_uint8,
        unpack_fp4_from_uint8,
    )
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    import corequant as cq

    torch.set_num_threads(threads)
    t, out = torch.from_numpy(x), np.empty_like(x)
    packed = np.zeros((len(x), x.shape[1] // 2), np.uint8)

    def ranges(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = t.unflatten(-1, (-1, size))
        return parts.amin(-1), parts.amax(-1)

    whole = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=128)
    micro = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )
    nv = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )

    def theirs_int4() -> torch.Tensor:
        return fake_quantize(t, *calculate_qparams(*ranges(128), whole), whole)

    def theirs_mxfp4() -> torch.Tensor:
        scale, zero = calculate_qparams(*ranges(32), micro)
        return pack_fp4_to_uint8(quantize(t, scale, zero, micro))

    def theirs_nvfp4() -> torch.Tensor:
        divisor = generate_gparam(t.min(), t.max())
        scale, zero = calculate_qparams(*ranges(16), nv, global_scale=divisor)
        return pack_fp4_to_uint8(quantize(t, scale.float(), zero, nv, global_scale=divisor))

    expected = cq.fake_quantize(x, "int4:group128")
    np.testing.assert_array_equal(theirs_int4().numpy(), expected)
    for text, theirs in (("mxfp4:even", theirs_mxfp4()), ("nvfp4", theirs_nvfp4())):
        ours = cq.quantize_packed(x, text).packed
        assert (theirs.numpy() != ours).mean() < 1e-3, text
    fours = {text: torch.from_numpy(cq.quantize_packed(x, text).packed) for text in FOURS}
    steps = {text: torch.from_numpy(_steps(cq.quantize(x, text))) for text in FOURS}
    whole4 = cq.quantize(x, "int4:group128")
    integers = pack_to_int32(torch.from_numpy(whole4.codes), 4)
    steps["int4"] = torch.from_numpy(whole4.scales)

    def theirs_reading(text: str) -> torch.Tensor:
        numbers = unpack_fp4_from_uint8(fours[text], *x.shape, torch.float32)
        return (numbers.unflatten(-1, (-1, FOURS[text])) * steps[text][..., None]).flatten(-2)

    def theirs_reading_int4() -> torch.Tensor:
        numbers = unpack_from_int32(integers, 4, t.shape).float()
        return (numbers.unflatten(-1, (-1, 128)) * steps["int4"][..., None]).flatten(-2)

    packed4 = {text: cq.quantize_packed(x, text) for text in (*FOURS, "int4:group128")}
    for text in FOURS:
        np.testing.assert_array_equal(
            theirs_reading(text).numpy(), cq.dequantize_packed(packed4[text])
        )
    np.testing.assert_array_equal(
        theirs_reading_int4().numpy(), cq.dequantize_packed(packed4["int4:group128"])
    )
    micro_layer = brevitas_mxfp4(t)
    np.testing.assert_array_equal(
        micro_layer().numpy().reshape(x.shape), cq.fake_quantize(x, "mxfp4")
    )
    found: Candidates = {
        "int4:group128 ours": lambda: cq.fake_quantize(x, "int4:group128", out=out),
        "int4:group128 compressed-tensors": theirs_int4,
        "int4:group128 brevitas": brevitas_int4(t),
        "mxfp4 encode ours": lambda: cq.quantize_packed(x, "mxfp4:even", out=packed),
        "mxfp4 encode compressed-tensors": theirs_mxfp4,
        "mxfp4 encode brevitas": micro_layer,
        "nvfp4 encode ours": lambda: cq.quantize_packed(x, "nvfp4", out=packed),
        "nvfp4 encode compressed-tensors": theirs_nvfp4,
    }
    for text in packed4:
        found[f"{text} decode ours"] = lambda text=text: cq.dequantize_packed(
            packed4[text], out=out
        )
        found[f"{text} decode compressed-tensors"] = (
            (lambda text=text: theirs_reading(text)) if text in FOURS else theirs_reading_int4
        )
    return found


FOURS = {"mxfp4": 32, "nvfp4": 16}
"""Formats of 4-bit floats, with the sizes of their groups."""


def _steps(quantized: Any) -> np.ndarray:
    """What codes are multiplied by."""
    from corequant._cpu.scales import effective

    return effective(quantized.scales, quantized.global_scale)


def brevitas_mxfp4(t: object) -> Callable[[], object]:
    from brevitas.quant.experimental.mx_quant_ocp import MXFloat8e4m3Weight

    quantizer = MXFloat8e4m3Weight.let(
        bit_width=4, exponent_bit_width=2, mantissa_bit_width=1, group_size=32, group_dim=1
    )
    return brevitas_layer(t, quantizer)


def brevitas_int4(t: object) -> Callable[[], object]:
    from brevitas.inject.enum import ScalingPerOutputType
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloat

    quantizer = Int8WeightPerChannelFloat.let(
        bit_width=4,
        group_size=128,
        group_dim=1,
        scaling_per_output_type=ScalingPerOutputType.GROUP,
    )
    return brevitas_layer(t, quantizer)


def brevitas_layer(t: object, quantizer: object) -> Callable[[], object]:
    import torch
    from brevitas.nn import QuantLinear

    assert isinstance(t, torch.Tensor)
    layer = QuantLinear(t.shape[1], t.shape[0], bias=False, weight_quant=quantizer)
    layer.weight.data = t.clone()
    layer.eval()

    def run() -> object:
        with torch.no_grad():
            return layer.quant_weight().value

    return run


TARGETS = {
    "fake_quantize int4:group128": 0.8,
    "fake_quantize int4:group32": 0.8,
    "quantize_packed mxfp4": 0.4,
    "quantize_packed nvfp4": 0.4,
    "dequantize_packed mxfp4": 0.8,
    "dequantize_packed nvfp4": 0.8,
    "dequantize_packed int4:group128": 0.8,
    "exact": 1 / 20,
}
"""Least ratios of the baseline's time to ours."""

TIMES_FASTER = 5.0
"""Least ratio of a peer's time to ours."""

Row = tuple[str, float, float | None, float | None]


def report(
    candidates: Candidates, baseline: str | None, rounds: int, clock: Callable[[], float]
) -> list[Row]:
    """Print and return name, milliseconds, ratio and target of each candidate."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    order = list(candidates)
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            started = clock()
            candidates[name]()
            times[name].append(clock() - started)
    rows: list[Row] = []
    for name in order:
        reference, own, target = baseline, name, TARGETS.get(name)
        if baseline is None and not name.endswith(" ours"):
            # A peer: how many times longer it takes than ours.
            what = name.rpartition(" ")[0]
            reference, own, target = name, f"{what} ours", TIMES_FASTER
        ratio = None
        if reference is not None:
            pairs = zip(times[reference], times[own], strict=True)
            ratio = float(np.median([a / b for a, b in pairs]))
        rows.append((name, float(np.median(times[name])) * 1e3, ratio, target))
        print(f"  {name:44s} {rows[-1][1]:10.2f} ms {_cell(ratio):>8s} (target {_cell(target)})")
    return rows


def markdown_table(title: str, rows: list[Row]) -> str:
    lines = [f"### {title.capitalize()}", "", "| | ms | ratio | target |", "|---|---|---|---|"]
    lines += [f"| {n} | {ms:.2f} | {_cell(r)} | {_cell(t)} |" for n, ms, r, t in rows]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def described() -> str:
    names = ("numpy", "numba", "torch", "compressed-tensors", "brevitas")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    from corequant._cpu.codegen.compiler import processor

    return f"{processor()[0]}, Python {platform.python_version()}, {versions}."


if __name__ == "__main__":
    main()

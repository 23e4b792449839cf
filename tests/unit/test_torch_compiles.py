"""Triton's kernels compile for compute capability 9.0, which takes no GPU.

In a process of its own: whether kernels are compiled or interpreted is chosen once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from corequant_torch.gpu import columns, fusion, rotation, statistics
from corequant.specs import QuantSpec

def build(name, kernel, constants, integers=(), floats=(), warps=8, kind="i32", **pointers):
    kinds = dict.fromkeys(kernel.arg_names, "*fp32")
    kinds |= dict.fromkeys(integers, kind) | dict.fromkeys(floats, "fp32") | pointers
    kinds |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, kinds, constexprs=places)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = re.sub("//.*", "", made.asm["ptx"])
    found = {"cubin": len(made.asm["cubin"]) > 0, "shared": made.metadata.shared}
    for what in ("mma", "fma.", ".ftz", "approx", "div.full", "atom", ".local"):
        found[what] = ptx.count(what)
    # Arguments that are numbers must not be part of what is compiled: batches differ in size.
    numbers = [p for p in kernel.params if p.name in integers]
    found["specialized"] = sum(not p.do_not_specialize for p in numbers)
    print(json.dumps([name, found]), flush=True)

build(
    "columns",
    columns.round_block,
    dict(R=8, B=128, ECHO=True, WHOLE=False, LEAST=-1.0, MOST=1.0, STEPS=4),
    ("rows", "width", "start", "size", "per_row", "count"),
    warps=4,
    groups="*i32",
)
build(
    "moments",
    statistics.channel_moments,
    dict(R=16, C=128),
    ("rows", "d", "length"),
    x="*bf16",
    parts="*fp64",
)
build(
    "decode",
    statistics.decode_groups,
    dict(WHOLE=True, SHIFTED=True, N=2048),
    ("count", "size"),
    codes="*i8",
)
turned = [(1, "*bf16", 1), (16, "*bf16", 1), (128, "*fp32", 2), (4096, "*fp16", 0)]
for power, kind, signs in [*turned, (16384, "*fp32", 1), (512, "*bf16", 2)]:
    constants, warps = rotation.turning_tile(power)
    build(
        f"rotate {power} {kind}",
        rotation.rotate_powers,
        constants | dict(SIGNS=signs, INTERPRETED=False),
        ("blocks", "per_row"), ("scale",), warps, x=kind, out=kind, sign_table="*i8",
    )
constants, warps = rotation.turning_tile(64)
build(
    "rotate more than 2**31 blocks",
    rotation.rotate_powers,
    constants | dict(SIGNS=1, INTERPRETED=False),
    ("blocks", "per_row"), ("scale",), warps, "i64", x="*bf16", out="*bf16", sign_table="*i8",
)
for core, power, kind in [(12, 1, "*fp16"), (28, 512, "*bf16"), (172, 64, "*fp32")]:
    constants, warps = rotation.mixing_tile(core, power)
    build(
        f"mix {core} {power} {kind}",
        rotation.mix_cores,
        constants | dict(SIGNS=2, INTERPRETED=False),
        ("columns", "per_row"), ("scale",), warps,
        out=kind, sign_table="*i8", core_table="*i8",
    )
for text, kind, out, what in [
    ("mxfp4", "*bf16", "*u8", fusion.PACKED),
    ("nvfp4", "*fp32", "*u8", fusion.NOTHING),
    ("nvfp4", "*fp32", "*u8", fusion.PACKED),
    ("int4:group128:asymmetric", "*fp16", "*i8", fusion.CODES),
    ("int4:group32", "*bf16", "*bf16", fusion.VALUES),
]:
    spec = QuantSpec.parse(text)
    build(
        f"fused {text}, {what}",
        fusion.rotate_quantize_tiles,
        dict(R=32, T=128, BLOCK=128, GROUP=spec.group_size, PERMUTED=True, SIGNED=True,
             **fusion._scheme(spec), OUT=what, INTERPRETED=False),
        ("tiles", "per_row", "d"), ("factor",),
        x=kind, order="*i64", sign_table="*i8", out=out, largest_bits="*i32",
    )
"""


@pytest.mark.interpreter
def test_kernels_compile_and_round_as_numpy_does():
    """No tensor cores, whose sums are cut off; nothing flushed, approximated, or fused unasked."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(found) == 18
    for name, counts in found.items():
        assert counts["cubin"], name
        assert counts["specialized"] == 0, name
        assert counts["shared"] <= 227 * 1024, name
        for what in ("mma", ".ftz", "approx", "div.full", "atom", ".local"):
            assert counts[what] == 0, (name, what)
        if name != "moments":
            assert counts["fma."] == 0, name

"""Triton's kernels compile for compute capability 9.0, which takes no GPU, and spill nothing.

In a process of its own: whether kernels are compiled or interpreted is chosen once.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from corequant_torch import launch, triton_columns, triton_fused, triton_rotation, triton_streams
from corequant.specs import QuantSpec

def build(kernel, constants, integers=(), floats=(), **pointers):
    kinds = dict.fromkeys(kernel.arg_names, "*fp32")
    kinds |= dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32") | pointers
    kinds |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, kinds, constexprs=places)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, len(made.asm["cubin"]) > 0, made.asm["ptx"].count(".local"))

build(
    triton_columns.round_block,
    dict(R=8, B=128, ECHO=True, WHOLE=False, LEAST=-1.0, MOST=1.0, STEPS=4),
    ("rows", "width", "start", "size", "per_row", "count"),
    groups="*i32",
)
build(
    triton_streams.channel_moments,
    dict(R=16, C=128),
    ("rows", "d", "length"),
    x="*bf16",
    parts="*fp64",
)
build(
    triton_streams.decode_groups,
    dict(WHOLE=True, SHIFTED=True, N=2048),
    ("count", "size"),
    codes="*i8",
)
K, L, A, B = launch._shape(512)
build(
    triton_rotation.rotate_blocks,
    dict(K=K, L=L, A=A, B=B, SIGNS=1, FIRST=1, LATER=2, INTERPRETED=False),
    ("blocks", "per_row"),
    ("scale",),
    x="*bf16", out="*bf16", sign_table="*i8", core_table="*i8",
)
scheme = launch._scheme(QuantSpec.parse("mxfp4"))
build(
    triton_fused.rotate_quantize_tiles,
    dict(R=32, T=128, BLOCK=128, GROUP=32, PERMUTED=True, SIGNED=True, **scheme, OUT=2,
         INTERPRETED=False),
    ("tiles", "per_row", "d"),
    ("factor",),
    x="*bf16", order="*i64", sign_table="*i8", out="*u8", largest_bits="*i32",
)
"""


@pytest.mark.interpreter
def test_kernels_compile():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False
    )
    names = ["round_block", "channel_moments", "decode_groups", "rotate_blocks"]
    expected = [f"{name} True 0" for name in [*names, "rotate_quantize_tiles"]]
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr

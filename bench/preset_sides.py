"""One side of bench_presets.py, in a process and if need be an environment of its own.

Usage: python preset_sides.py FOLDER SIDE ROW

FOLDER holds ``float`` (a Transformers directory), the token windows ``calibration.npy`` and
``test.npy``, and ``reference.npz``, the float model's last hidden states on the latter and its
head. Needs torch, Transformers and the side's own package; prints a JSON object on its last line.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SLICE = 256
"""Positions whose logits are compared at a time."""

Build = Callable[[], Any]


@torch.no_grad()
def compare(model: Any, folder: Path) -> dict[str, float]:
    """Return perplexity, mean KL from the float model, both of all predicted positions, and top-1.

    Every side is measured here, by its logits.
    """
    kept = np.load(folder / "reference.npz")
    head = torch.from_numpy(kept["head"])
    loss = divergence = agreed = 0.0
    windows = np.load(folder / "test.npy")
    for window, hidden in zip(windows, kept["hidden"], strict=True):
        ids = torch.from_numpy(window)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        for start in range(0, len(window) - 1, SLICE):
            there = slice(start, min(start + SLICE, len(window) - 1))
            ours = torch.log_softmax(logits[there].float(), -1)
            reference = torch.log_softmax(torch.from_numpy(hidden[there]) @ head.T, -1)
            target = ids[0, there.start + 1 : there.stop + 1, None]
            loss -= float(ours.gather(1, target).double().sum())
            divergence += float((reference.exp() * (reference - ours)).sum(-1).double().sum())
            agreed += float((ours.argmax(-1) == reference.argmax(-1)).sum())
    count = windows.shape[0] * (windows.shape[1] - 1)
    return {
        "perplexity": math.exp(loss / count),
        "kl": divergence / count,
        "top1": agreed / count,
    }


def load(folder: Path, **options: Any) -> Any:
    """Return the float model."""
    from transformers import AutoModelForCausalLM

    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder / "float", **options).eval()


# ---- corequant


def corequant(folder: Path, row: str) -> Build:
    """Carry out a preset, from the model's directory to one of its own."""
    import corequant_transformers as cqhf

    tokens, out = np.load(folder / "calibration.npy"), folder / f"corequant-{row}"
    recipe = recipe_of(row)
    return lambda: cqhf.quantize(folder / "float", recipe, tokens, out).model


def recipe_of(row: str) -> Any:
    """Return a preset's recipe, or one that keeps embedding and head one matrix.

    After the preset's name these say how: ``heads`` is as ``--for transformers`` makes it,
    ``int8`` rounds both.
    """
    from corequant.recipe import Recipe

    for rotation, reader in (("heads", "transformers"), ("online", "corequant")):
        name, named, more = row.partition(f"-{rotation}")
        if named:
            rounded = {"embeddings": "int8:channel", "head": "int8:channel"} if more else {}
            return Recipe.preset(name, reader=reader, rotation=rotation, **rounded)
    return Recipe.preset(row)


# ---- llm-compressor


def llmcompressor(folder: Path, row: str) -> Build:
    """Let ``oneshot`` do it, with its modifiers' defaults where nothing is said."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    tokens = np.load(folder / "calibration.npy")
    ids = tokens.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": np.ones_like(tokens).tolist()})
    group = {"targets": ["Linear"], **_schemes()[row]}
    steps = [
        *_transforms(row),
        GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"]),
    ]

    def build() -> Any:
        model = load(folder)
        oneshot(
            model=model,
            dataset=data,
            recipe=steps,
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
            shuffle_calibration_samples=False,
        )
        return model

    return build


def _schemes() -> dict[str, dict[str, Any]]:
    # Searched scales where that is not a format's own affair, as in corequant's presets.
    group = {"type": "int", "symmetric": True, "observer": "mse"}
    four = {**group, "num_bits": 4, "strategy": "group", "group_size": 32}
    inputs = {"type": "int", "strategy": "token", "dynamic": True}
    eight = {**inputs, "num_bits": 8, "symmetric": True}
    return {
        "w4a16": {"weights": four},
        "w4a8": {"weights": four, "input_activations": eight},
        "w8a8": {
            "weights": {**group, "num_bits": 8, "strategy": "channel"},
            "input_activations": eight,
        },
        "w4a4": {
            "weights": {**group, "num_bits": 4, "strategy": "channel"},
            "input_activations": {**inputs, "num_bits": 4, "symmetric": False},
        },
        "w3a16": {"weights": {**four, "num_bits": 3}},
        "w2a16": {"weights": {**four, "num_bits": 2}},
    }


def _transforms(row: str) -> list[Any]:
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if row == "w8a8":
        return [SmoothQuantModifier(smoothing_strength=0.8)]
    if row == "w4a4":
        return [SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="hadamard")]
    return []


# ---- GPTQModel


def gptqmodel(folder: Path, row: str) -> Build:
    """Let GPTQModel round the weights, save them, and load them for its torch kernel."""
    # Its pool of threads needs two, and takes half of the processors.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    tokens = np.load(folder / "calibration.npy").tolist()
    bits = {"w4a16": 4, "w3a16": 3, "w2a16": 2}[row]

    def build() -> Any:
        config = QuantizeConfig(bits=bits, group_size=32, sym=True, device="cpu")
        model = GPTQModel.load(str(folder / "float"), config)
        data = [{"input_ids": w, "attention_mask": [1] * len(w)} for w in tokens]
        model.quantize(data, batch_size=1, backend=BACKEND.TORCH)
        out = folder / f"gptqmodel-{row}"
        model.save(str(out))
        return GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH).model

    return build


# ---- brevitas

BREVITAS = {
    "w4a16": "--weight-bit-width 4 --weight-quant-granularity per_group --weight-group-size 32 "
    "--weight-param-method mse --qronos --qronos-alpha 1e-4 --gpxq-act-order",
    "w8a8": "--weight-bit-width 8 --weight-quant-granularity per_channel --input-bit-width 8 "
    "--input-quant-granularity per_row --input-scale-type dynamic --input-quant-type sym "
    "--weight-param-method mse --gptq --gpxq-act-order",
    "w4a4": "--weight-bit-width 4 --weight-quant-granularity per_channel --input-bit-width 4 "
    "--input-quant-granularity per_row --input-scale-type dynamic --quantize-input-zero-point "
    "--rotation fused_no_fx --replace-rmsnorm --rotation-orphan-sink "
    "--qronos --qronos-alpha 1e-3 --gpxq-act-order",
}


def brevitas(folder: Path, row: str) -> Build:
    """Let brevitas's own program do it, from the same windows."""
    import brevitas_examples.llm.main as program
    from brevitas_examples.llm.llm_quant import gpxq

    tokens = np.load(folder / "calibration.npy")
    program.get_dataset_for_model = lambda **_: [
        {"input_ids": torch.from_numpy(w)[None]} for w in tokens
    ]
    # Blocks are sent to a GPU.
    gpxq.send_to_device = lambda x, device: x
    options = (
        f"--model {folder / 'float'} --dtype float32 --nsamples {len(tokens)} "
        f"--seqlen {tokens.shape[1]} --gpxq-block-name model.layers {BREVITAS[row]}"
    )
    given = program.create_args_parser().parse_args(options.split())
    return lambda: program.quantize_llm(given)[1]


SIDES = {
    "corequant": corequant,
    "llm-compressor": llmcompressor,
    "GPTQModel": gptqmodel,
    "brevitas": brevitas,
}


def main() -> None:
    folder, side, row = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    build = SIDES[side](folder, row)
    begun = time.process_time()
    model = build()
    # Of the processor: other processes may share it.
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**compare(model, folder), "seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()

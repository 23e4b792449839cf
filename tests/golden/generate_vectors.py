"""Write the golden vectors of ``corequant.testing`` and their manifest (run from the root).

The definitions are spelled out here in exact or plain NumPy arithmetic only for the input; codes
come from the NumPy backend, which the reference tests prove against ml_dtypes, compressed-tensors
and brute force.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

import corequant as cq
from corequant.testing import GOLDEN_SPECS

FOLDER = Path(__file__).resolve().parents[2] / "corequant" / "golden"


def vectors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(2601)
    x = (generator.normal(size=(6, 64)) * np.exp(generator.normal(size=64))).astype(np.float32)
    x[1] = 0
    x[2, :16] = 0
    # Ties of every format with a scale of one, and what float32 barely holds.
    x[3] = np.arange(-32, 32) / 4
    x[4] *= np.float32(1e-38)
    found = {"x": x}
    for text in GOLDEN_SPECS:
        q = cq.quantize(x, text)
        found[f"{text} codes"], found[f"{text} scales"] = q.codes, q.scales
        for name in ("zero_points", "global_scale"):
            if getattr(q, name) is not None:
                found[f"{text} {name}"] = getattr(q, name)
        found[f"{text} values"] = cq.dequantize(q)
    return found


def archive(arrays: dict[str, np.ndarray]) -> bytes:
    """Return an npz whose bytes depend on the arrays alone: entries carry no time."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
            target.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
    return stream.getvalue()


def main() -> None:
    data = archive(vectors())
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "vectors.npz").write_bytes(data)
    manifest = {
        "file": "vectors.npz",
        "sha256": hashlib.sha256(data).hexdigest(),
        "generator": "tests/golden/generate_vectors.py",
    }
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()

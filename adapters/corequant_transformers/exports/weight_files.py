"""Tensors written to files of a bounded size, in Transformers' layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from corequant.storage.files import json_text
from corequant.storage.tensor_file import RawTensor, write_tensors

__all__ = ["write_shards"]


def write_shards(
    folder: Path, tensors: Iterator[tuple[str, RawTensor]], shard_bytes: int
) -> dict[str, str]:
    """Write tensors as they come, a file's worth at a time; return each tensor's file.

    Parameters
    ----------
    folder : Path
    tensors : iterator of (str, RawTensor)
        Names and tensors.
    shard_bytes : int
        Largest size of a file; a single tensor may be larger.
    """
    parts: list[tuple[Path, list[str]]] = []
    pending: dict[str, RawTensor] = {}
    size = total = 0

    def flush() -> None:
        file = folder / f"part-{len(parts):05d}"
        write_tensors(file, pending)
        parts.append((file, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.data.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.data.nbytes
        total += tensor.data.nbytes
    flush()
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(parts, 1):
        title = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        title = title if len(parts) > 1 else "model.safetensors"
        file.rename(folder / title)
        places |= dict.fromkeys(names, title)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        file = folder / "model.safetensors.index.json"
        file.write_bytes(json_text(index).encode())
    return places

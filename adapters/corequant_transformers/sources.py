"""Where a model comes from: a Transformers directory, or a GGUF file."""

from __future__ import annotations

import fnmatch
import functools
import json
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

from corequant.errors import CheckpointError
from corequant.shardindex import read_index
from corequant_transformers.architectures import MOST_BLOCKS
from corequant_transformers.surroundings import undisturbed

__all__ = ["Source", "check_config", "quiet_transformers", "read_json"]

_OWN_TYPE = "corequant_"
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.tiktoken",
    "LICENSE*",
)

_LOADING = threading.Lock()
"""Transformers exchanges the dtype by default and functions of torch while it loads."""


class Source:
    """A model on disk.

    Parameters
    ----------
    path : str or Path
        A directory with ``config.json`` and safetensors files, or a ``.gguf`` file.

    Raises
    ------
    CheckpointError
        If there is no such model, or a file that its index names is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_gguf = self.path.suffix == ".gguf" and self.path.is_file()
        self._shards = [self.path / "model.safetensors"]
        if not self.is_gguf:
            self._check_directory()

    def _check_directory(self) -> None:
        if not self.path.is_dir():
            raise CheckpointError(
                f"MODEL must be a directory with config.json or a .gguf file, got {self.path}"
            )
        config = read_json(self.path / "config.json")
        check_config(config, self.path / "config.json")
        kind = config.get("model_type")
        if isinstance(kind, str) and kind.startswith(_OWN_TYPE):
            raise CheckpointError(
                f"{self.path} is already quantized by corequant; quantize the float model, or load "
                "this one with corequant_transformers.load"
            )
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            check_inside(self.path, index)
            self._shards = sorted(set(read_index(index).values()))
        for shard in self._shards:
            check_inside(self.path, shard)

    def shards(self) -> list[Path]:
        """Return a directory's files of weights."""
        return list(self._shards)

    def _location(self) -> tuple[str, dict[str, str]]:
        if self.is_gguf:
            return str(self.path.parent), {"gguf_file": self.path.name}
        return str(self.path), {}

    def config(self) -> Any:
        """Return the Transformers config."""
        where, options = self._location()
        with _as_checkpoint_error(self.path):
            return transformers.AutoConfig.from_pretrained(
                where, local_files_only=True, trust_remote_code=False, **options
            )

    def tokenizer(self) -> Any:
        """Return the tokenizer."""
        where, options = self._location()
        with _as_checkpoint_error(self.path):
            return transformers.AutoTokenizer.from_pretrained(
                where, local_files_only=True, trust_remote_code=False, **options
            )

    @undisturbed()
    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the float model, in evaluation mode and without gradients.

        Raises
        ------
        CheckpointError
            If a file is truncated or malformed, or weights are missing.
        """
        where, options = self._location()
        with _LOADING, _as_checkpoint_error(self.path):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} weights, the first is {missing[0]}"
            )
        if self.is_gguf:
            # Transformers marks it as quantized although it decoded every weight to float.
            model.is_quantized = False
            model.hf_quantizer = None
            model.config.__dict__.pop("quantization_config", None)
        return model.eval().requires_grad_(False)

    def tensor_names(self) -> list[str]:
        """Return the names of the tensors in safetensors files; of other files, none.

        Raises
        ------
        CheckpointError
            If a file is truncated or malformed.
        """
        if self.is_gguf:
            return []
        names: list[str] = []
        for shard in self.shards():
            with _as_checkpoint_error(self.path), safetensors.safe_open(shard, "np") as file:
                names += file.keys()
        return names

    def files(self) -> list[Path]:
        """Return all files that a result depends on."""
        if self.is_gguf:
            return [self.path]
        index = self.path / "model.safetensors.index.json"
        found = [self.path / "config.json", *self.shards(), *self.copied_files()]
        return [*found, index] if index.is_file() else found

    def copied_files(self) -> list[Path]:
        """Return the tokenizer's and generation's files, to be kept byte for byte."""
        if self.is_gguf:
            return []
        return sorted(f for f in self.path.iterdir() if f.is_file() and is_copied(f.name))


def check_inside(folder: Path, file: Path) -> None:
    """Raise CheckpointError unless a file really lies in a folder, or in its store of blobs.

    A link may lead to ``../../blobs`` beside the snapshots of a Hugging Face cache, nowhere else.
    """
    try:
        found = file.is_file()
        inside, real = folder.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the model's file {file} can't be read: {error}") from None
    if not found:
        raise CheckpointError(f"the model's file {file} is missing")
    blobs = inside.parent.parent / "blobs"
    if real.parent != inside and not (inside.parent.name == "snapshots" and real.parent == blobs):
        raise CheckpointError(f"{file} must be a file of its own folder, it leads to {real}")


def is_copied(name: str) -> bool:
    """Tell whether a file belongs to the tokenizer or to generation and is kept byte for byte."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _TOKENIZER_PATTERNS)


def check_config(values: Any, path: Path) -> None:
    """Raise CheckpointError for counts of layers that would have Transformers make endless lists.

    Parameters
    ----------
    values : dict
        A model's config as plain values, of which parts may be configs themselves.
    path : Path
        Where it is from.
    """
    waiting = [values]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif name in _LAYERS and isinstance(value, int | float) and not value <= MOST_BLOCKS:
                raise CheckpointError(
                    f"{name} of {path} must be at most {MOST_BLOCKS}, got {str(value)[:40]}"
                )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is a CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


class _Quiet:
    """Transformers' switches for progress bars and reports, off as long as one thread wants it.

    They belong to the process: the first who comes switches them off, and the last who goes puts
    back what nobody else has changed meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[int, bool, Any] = (0, False, None)
        self._within: tuple[int, Any] = (0, None)

    def __enter__(self) -> None:
        log: Any = transformers.utils.logging
        # The GGUF reader draws its bar without asking the switch.
        reader: Any = modeling_gguf_pytorch_utils
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._before = log.get_verbosity(), log.is_progress_bar_enabled(), reader.tqdm
            log.set_verbosity_error()
            log.disable_progress_bar()
            reader.tqdm = functools.partial(reader.tqdm, disable=True)
            self._within = log.get_verbosity(), reader.tqdm

    def __exit__(self, *error: object) -> None:
        log: Any = transformers.utils.logging
        reader: Any = modeling_gguf_pytorch_utils
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            verbosity, bars, gguf_bar = self._before
            if log.get_verbosity() == self._within[0]:
                log.set_verbosity(verbosity)
            if reader.tqdm is self._within[1]:
                reader.tqdm = gguf_bar
            if bars:
                log.enable_progress_bar()


_QUIET = _Quiet()


def quiet_transformers() -> AbstractContextManager[None]:
    """Keep Transformers' own progress bars and reports off the terminal for a while."""
    return _QUIET


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except CheckpointError:
        raise
    except Exception as error:
        # Transformers, safetensors and gguf each raise errors of their own for broken files.
        raise CheckpointError(f"{path} can't be loaded: {type(error).__name__}: {error}") from error

"""Where a model comes from: a Transformers directory, or a GGUF file."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from corequant.errors import CheckpointError, CorequantError
from corequant.storage.files import read_text
from corequant.storage.gguf_file import GgufFile
from corequant.storage.shard_index import check_homes, is_plain, read_index
from corequant.storage.tensor_file import TensorFile
from corequant_transformers.files.atomic import read_json
from corequant_transformers.files.comparison import comparing
from corequant_transformers.files.digests import check_digests, is_read
from corequant_transformers.files.hub import download_command, locate
from corequant_transformers.model.configs import (
    as_config_errors,
    check_config,
    check_unmarked,
    settle_config,
)
from corequant_transformers.model.gguf_files.configs import config_of
from corequant_transformers.model.gguf_files.weights import GgufWeights
from corequant_transformers.model.loaders import load_model
from corequant_transformers.model.parts import OUTSIDE, part_of, skeleton
from corequant_transformers.model.scaled import block_of
from corequant_transformers.model.shards import FileWeights
from corequant_transformers.model.source_files import (
    check_inside,
    files_to_copy,
    read_generation,
)
from corequant_transformers.model.streamed_experts import reads_experts
from corequant_transformers.model.surroundings import quiet_transformers, undisturbed
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["Source", "plan_of_files"]

_OWN_METHOD, _OWN_TYPE = "corequant", "corequant_"
"""``quant_method`` of directories that ``quantize`` writes, and how their model types began."""

_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_CONVERSION = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "i, o = {0!r}, {1!r}; M.from_pretrained(i, dtype='auto').save_pretrained(o); "
    'T.from_pretrained(i).save_pretrained(o)"'
)
_LOADING = threading.Lock()
"""Transformers exchanges the dtype by default and functions of torch while it loads."""


class Source:
    """A model on disk, as Transformers reads it.

    Weights are those of ``model.safetensors``; only where there is none, of the files that
    ``model.safetensors.index.json`` names. A ``config.json`` may name another file of the folder as
    ``transformers_weights``.

    Parameters
    ----------
    path : str or Path
        A directory with ``config.json`` and safetensors files, a ``.gguf`` file, or the id of a
        model in the local Hugging Face cache.
    verify : bool
        Compare files that have digests, which are exports of ours, with these.

    Raises
    ------
    CheckpointError
        If there is no such model, a file that its index names is missing, a file isn't a regular
        one of the folder, or the config asks for code that isn't torch's own.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = locate(path)
        # The name of a snapshot is a commit's.
        self._id = None if self.path == Path(path) else Path(path)
        self.is_gguf = self.path.suffix == ".gguf" and self.path.is_file()
        self.is_compressed = False
        self._block: tuple[int, int] | None = None
        self._compared = not verify
        self._gguf: GgufFile | None = None
        self._index: Path | None = None
        self._shards: list[Path] = []
        if not self.is_gguf:
            try:
                self._check_directory()
            except CheckpointError as error:
                command = None if self._id is None else download_command(self._id)
                if command is None:
                    raise
                # What Transformers itself looks at is often all of a model that is in the cache.
                raise CheckpointError(f"{error}; get all of it with: {command}") from error

    @property
    def name(self) -> str:
        """The file's or folder's own name, however the path to it is written, or a model's id."""
        if self._id is not None:
            return self._id.as_posix()
        return self.path.resolve().name

    def _check_directory(self) -> None:
        if not self.path.is_dir():
            command = download_command(self.path)
            hint = f"; if it is the id of a model, get it with: {command}" if command else ""
            raise CheckpointError(
                "MODEL must be a directory with config.json or a .gguf file, or the id of a model "
                f"in the local Hugging Face cache, got {self.path}{hint}"
            )
        file = self.path / "config.json"
        if os.path.lexists(file):
            check_inside(self.path, file)
        config = read_json(file)
        check_unmarked(file)
        check_config(config, file)
        kind, settings = config.get("model_type"), config.get("quantization_config")
        own = isinstance(settings, dict) and settings.get("quant_method") == _OWN_METHOD
        if own or (isinstance(kind, str) and kind.startswith(_OWN_TYPE)):
            raise CheckpointError(
                f"{self.path} is already quantized by corequant; quantize the float model, or load "
                "this one with corequant_transformers.load"
            )
        if (self.path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{self.path} must hold a whole model, got one with an adapter "
                "(adapter_config.json), which Transformers applies or not, depending on what is "
                "installed; merge it into the weights, or move it elsewhere"
            )
        self._block = block_of(settings, file)
        self.is_compressed = settings is not None and self._block is None
        self._find_weights(config.get("transformers_weights"))
        for name in self._shards:
            check_inside(self.path, name)
        self.copied_files()

    def _find_weights(self, named: Any) -> None:
        """Choose the files of weights in Transformers' own order."""
        single = self.path / "model.safetensors"
        index = self.path / "model.safetensors.index.json"
        if named is not None:
            if not isinstance(named, str) or not is_plain(named):
                raise CheckpointError(
                    f"transformers_weights of {self.path / 'config.json'} must name a file of the "
                    f"folder, got {str(named)[:80]!r}"
                )
            single = index = self.path / named
        if named is not None and named.endswith(".index.json"):
            self._index = index
        elif named is not None or os.path.lexists(single):
            self._shards = [single]
            if os.path.lexists(index) and index != single:
                check_homes(index)
        elif os.path.lexists(index):
            self._index = index
        else:
            raise CheckpointError(self._nothing_found(single))
        if self._index is not None:
            check_inside(self.path, self._index)
            self._shards = sorted(set(read_index(self._index).values()))

    def _nothing_found(self, single: Path) -> str:
        """Return an error message that names what there is instead of safetensors files."""
        found = sorted(f.name for f in self.path.iterdir() if f.suffix in _OTHER_WEIGHTS)
        if not found:
            return f"the model's file {single} is missing"
        if all(name.endswith(".safetensors") for name in found):
            return (
                f"the model's file {single} is missing; Transformers doesn't read {found[0]} "
                "without being told to, so rename it if it holds the weights"
            )
        return (
            f"the model's file {single} is missing; {found[0]} may run code when it is read, so "
            "convert it where you trust it, with a line that writes safetensors: "
            + _CONVERSION.format(str(self.path), f"{self.path}-safetensors")
        )

    def shards(self) -> list[Path]:
        """Return a directory's files of weights."""
        return list(self._shards)

    def _location(self) -> tuple[str, dict[str, str]]:
        if self.is_gguf:
            if not self._compared:
                # First: a reader that takes the size of an array from a damaged file asks the
                # system for all the memory that there is.
                check_digests(self.path)
                self._compared = True
            return str(self.path.parent), {"gguf_file": self.path.name}
        return str(self.path), {}

    @property
    def _gguf_file(self) -> GgufFile:
        """A GGUF file's header, read once."""
        self._location()
        if self._gguf is None:
            with _as_checkpoint_error(self.path):
                self._gguf = GgufFile(self.path)
        return self._gguf

    def config(self) -> Any:
        """Return the Transformers config.

        Raises
        ------
        ArchitectureError
            If a GGUF file has an architecture or a feature that isn't read.
        CheckpointError
            If it is malformed, or asks for code that isn't torch's own.
        """
        if self.is_gguf:
            return settle_config(config_of(self._gguf_file), self.config_file)
        with _as_checkpoint_error(self.path):
            config = transformers.AutoConfig.from_pretrained(
                str(self.path), local_files_only=True, trust_remote_code=False
            )
        if self._block is not None:
            del config.quantization_config
        return settle_config(config, self.config_file)

    def config_text(self) -> str:
        """Return the float model's ``config.json``."""
        if self.is_gguf:
            return str(self.config().to_json_string(use_diff=False))
        if self._block is None:
            return read_text(self.config_file)
        values = read_json(self.config_file)
        values.pop("quantization_config")
        return json.dumps(values, indent=2)

    @property
    def config_file(self) -> Path:
        """Where the config is: in a file of its own, or in the GGUF file."""
        return self.path if self.is_gguf else self.path / "config.json"

    def tokenizer(self, *, needed: bool = True) -> Any:
        """Return the tokenizer; None if it isn't ``needed``, can't be loaded and can be copied."""
        try:
            return self._tokenizer()
        except CheckpointError:
            if needed or self.is_gguf:
                raise
            return None

    def _tokenizer(self) -> Any:
        where, options = self._location()
        if self.is_compressed and not self._compared:
            check_digests(
                self.path, lambda name: is_read(name) and not name.endswith(".safetensors")
            )
        with _as_checkpoint_error(self.path):
            return transformers.AutoTokenizer.from_pretrained(
                where, local_files_only=True, trust_remote_code=False, **options
            )

    @undisturbed()
    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the float model, in evaluation mode and without gradients.

        Parameters
        ----------
        dtype : torch.dtype
            Dtype of its weights. MXFP4 and NVFP4 exports are always bfloat16, the only dtype that
            compressed-tensors decodes them to.

        Raises
        ------
        CheckpointError
            If a file is truncated or malformed, weights are missing, or Transformers can't make a
            model from the config.
        """
        if not self.is_compressed:
            return self._read_model(dtype)
        # A directory's digests are compared by the quantizer that Transformers calls.
        with _LOADING, comparing(not self._compared), _as_checkpoint_error(self.path):
            loaded: Any = load_model(
                str(self.path),
                self.config(),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} weights, the first is {missing[0]}"
            )
        return model.eval().requires_grad_(False)

    def _read_model(self, dtype: torch.dtype) -> Any:
        model = self.skeleton()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        weights = self.weights(model)
        parts: dict[str, list[str]] = {}
        for key in model.state_dict():
            if key not in weights.shared:
                # A block at a time, so that no more than its weights are held twice.
                found = re.search(r"\.\d+\.", key)
                parts.setdefault(found[0] if found else "", []).append(key)
        for keys in parts.values():
            weights.fill(model, keys, dtype)
        model.tie_weights(missing_keys=set(weights.shared), recompute_mapping=False)
        model.config.name_or_path, model.config.dtype = str(self.path), dtype
        generation = None if self.is_gguf else read_generation(self.path)
        model.generation_config = generation or getattr(model, "generation_config", None)
        return model.eval().requires_grad_(False)

    def skeleton(self) -> Any:
        """Return the model's structure, with its parameters on the meta device.

        Raises
        ------
        CheckpointError
            If Transformers can't make a model from the config; names the field where it can be
            told.
        """
        config = self.config()
        values = config.to_dict() if self.is_gguf else read_json(self.config_file)
        with as_config_errors(self.config_file, values):
            return skeleton(config)

    def weights(self, model: Any, plan: ModelPlan | None = None) -> FileWeights | GgufWeights:
        """Return the weights for a skeleton; see ``FileWeights`` and ``GgufWeights``."""
        if self.is_gguf:
            return GgufWeights(self._gguf_file, model, plan)
        return FileWeights(self.path, self.shards(), model, plan, self._block)

    def tensor_names(self) -> list[str]:
        """Return the names of the tensors in safetensors files; of other files, none.

        Raises
        ------
        CheckpointError
            If a file is truncated or malformed.
        """
        if self.is_gguf:
            return []
        return [name for shard in self.shards() for name in TensorFile(shard).names]

    def files(self) -> list[Path]:
        """Return all files that a result depends on."""
        if self.is_gguf:
            return [self.path]
        index = [] if self._index is None else [self._index]
        return [self.path / "config.json", *self.shards(), *self.copied_files(), *index]

    def copied_files(self) -> list[Path]:
        """Return the tokenizer's and generation's files, to be kept byte for byte.

        Raises
        ------
        CheckpointError
            If one isn't a regular file of the folder.
        """
        return [] if self.is_gguf else files_to_copy(self.path)


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except CorequantError:
        raise
    except Exception as error:
        # Transformers, safetensors and gguf each raise errors of their own for broken files.
        raise CheckpointError(f"{path} can't be loaded: {type(error).__name__}: {error}") from error


def plan_of_files(plan: ModelPlan, model: Any, weights: Any) -> ModelPlan:
    """Return a plan with what follows from a model's files.

    Parameters
    ----------
    plan : ModelPlan
        Made of the config.
    model : transformers.PreTrainedModel
        A skeleton.
    weights : Weights
        Of its files.
    """
    named = model.named_parameters()
    outside = sum(p.numel() for n, p in named if part_of(n, plan) == OUTSIDE)
    return replace(
        plan,
        tied=plan.tied and bool(weights.shared),
        outside_bytes=4 * outside,
        by_expert=reads_experts(weights, plan, model.state_dict()),
    )

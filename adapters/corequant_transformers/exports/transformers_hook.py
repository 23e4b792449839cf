"""Teach Transformers the run-time rotations that a compressed-tensors directory declares.

Transformers 5.17 to 5.24 ignores ``transform_config`` and would compute nonsense. Importing
``corequant_transformers`` replaces Transformers' own config and quantizer for the method
compressed-tensors with this module's, which do the same and rotate. Directories that corequant
writes carry ``GUARD`` where Transformers alone expects one of four words, so that it stops with an
error that names the package to import; vLLM, which has rotations of its own, doesn't read it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import logging
from transformers.utils import quantization_config as configs

from corequant.errors import CheckpointError, HadamardOrderError, OutputError
from corequant.hadamard import hadamard_matrix
from corequant.rotation import block_hadamard
from corequant_transformers.files.comparison import Comparison
from corequant_transformers.files.marks import GUARD

__all__ = ["BlockTransform", "install"]

_METHOD = "compressed-tensors"
_TYPES = ("hadamard", "random-hadamard")
_MERGED = ("weight_input", "weight_output")
_IN_BFLOAT16 = ("mxfp4-pack-quantized", "nvfp4-pack-quantized")
"""Formats that compressed-tensors decodes to bfloat16 when the model is first called, whatever the
dtype of the rest; products of that with another dtype fail in torch."""


@dataclass(frozen=True)
class _Online:
    """One rotation at run time: of the inputs or outputs of the layers that targets name."""

    group: str
    location: str
    size: int | None
    inverse: bool
    targets: tuple[str, ...]
    ignored: tuple[str, ...]

    def finds(self, name: str, module: torch.nn.Module) -> bool:
        return _named(self.targets, name, module) and not _named(self.ignored, name, module)


class BlockTransform(torch.nn.Module):
    """Multiply blocks of the last axis by a matrix M, divided by the root of its length.

    Parameters
    ----------
    size : int
        Block length n.
    inverse : bool
        Multiply by the transpose.

    Attributes
    ----------
    weight : torch.nn.Parameter (n, n)
        M; orthogonal up to the factor √n, ±1 for Hadamard matrices.
    known : bool
        M is `corequant.hadamard_matrix` of its order, so that the product is `block_hadamard`'s, to
        the bit: another order of sums moves activations at ties to other codes.
    """

    def __init__(self, size: int, inverse: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size, size), requires_grad=False)
        self.inverse = inverse
        self.known = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` (..., d) with its blocks transformed, in its dtype; d a multiple of n."""
        if self.known:
            rotated: torch.Tensor = block_hadamard(x, len(self.weight), inverse=self.inverse)
            return rotated
        matrix = self.weight.float()
        matrix = matrix.T if self.inverse else matrix
        n = matrix.shape[0]
        blocks = x.float().reshape(*x.shape[:-1], -1, n) @ matrix
        return (blocks / math.sqrt(n)).reshape(x.shape).to(x.dtype)


class _Config(configs.CompressedTensorsConfig):  # type: ignore[misc, unused-ignore]
    """Transformers' config that keeps ``transform_config``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.transform_config = kwargs.pop("transform_config", None) or {}
        self.online = tuple(_read(self.transform_config))
        status = kwargs.get("quantization_status")
        if isinstance(status, str) and status.startswith(GUARD):
            kwargs["quantization_status"] = status.removeprefix(GUARD).strip(" ()") or "compressed"
        super().__init__(*args, **kwargs)

    def post_init(self) -> None:
        """Leave ``dequantize`` as it was given.

        Transformers before 5.18 sets it where weights are stored decoded already, drops the config
        from the model, and with it the rotations from what the model is saved as.
        """
        asked = self.dequantize
        prepare: Any = super().post_init
        prepare()
        if not asked and not self.is_quantization_compressed:
            self.dequantize = False

    def to_dict(self) -> dict[str, Any]:
        """Return what ``save_pretrained`` writes: rotations and guard stay."""
        values: dict[str, Any] = super().to_dict()
        if self.transform_config:
            values["transform_config"] = copy.deepcopy(self.transform_config)
            # Of a model that ran the weights are decoded: they would be taken for codes.
            given = values.get("quantization_status") or "compressed"
            status = str(getattr(given, "value", given))
            guard = GUARD if status == "compressed" else f"{GUARD} ({status})"
            values["quantization_status"] = guard
        return values


# Transformers compares names of classes where configs come from two places.
_Config.__name__ = configs.CompressedTensorsConfig.__name__


class _Quantizer(CompressedTensorsHfQuantizer):  # type: ignore[misc, unused-ignore]
    """Transformers' quantizer that rotates at run time."""

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that a model is loaded in, where one was asked for."""
        config = self.quantization_config
        self._dtype = dtype
        if dtype == torch.bfloat16 or config.dequantize or not _runs_in_bfloat16(config):
            return dtype
        log: Any = logging.get_logger(__name__)
        log.warning_once(
            f"compressed-tensors decodes these weights to bfloat16 when the model is called, so it "
            f"is loaded in bfloat16 instead of {str(dtype).removeprefix('torch.')}"
        )
        return torch.bfloat16

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        before: Any = super()._process_model_before_weight_loading
        before(model, **kwargs)
        self._digests = Comparison(kwargs.get("checkpoint_files"))
        for online in getattr(self.quantization_config, "online", ()):
            _attach(model, online)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        result = super()._process_model_after_weight_loading(model, **kwargs)
        _check_matrices(model)
        self._digests.finish()
        config = self.quantization_config
        if config.dequantize:
            _cast_decoded(model, getattr(self, "_dtype", None))
        if getattr(config, "online", ()) and config.dequantize:
            model.save_pretrained = _refuse_to_save
        return result


def _cast_decoded(model: Any, dtype: torch.dtype | None) -> None:
    """Give decoded weights the model's dtype; Transformers before 5.18 leaves them in bfloat16."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if dtype and weight is not None and hasattr(module, "quantization_scheme"):
            weight.data = weight.data.to(dtype)


def _runs_in_bfloat16(config: Any) -> bool:
    given = config.quantization_config
    groups = getattr(given, "config_groups", None) or {}
    formats = [getattr(part, "format", None) for part in (given, *groups.values())]
    # Some versions have an enumeration there.
    return any(getattr(f, "value", f) in _IN_BFLOAT16 for f in formats)


def _refuse_to_save(*given: Any, **options: Any) -> None:
    """Stand in for ``save_pretrained``, which would write weights and leave out their rotations."""
    raise OutputError(
        "save_pretrained would lose the run-time rotations of weights that were dequantized when "
        "they were loaded; load the directory without dequantize=True and save that model"
    )


def install() -> None:
    """Replace Transformers' own config and quantizer; doing it twice changes nothing.

    Importing ``corequant_transformers`` has it done as soon as Transformers loads its quantizers.

    Examples
    --------
    >>> import corequant_transformers
    >>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    >>> AUTO_QUANTIZER_MAPPING["compressed-tensors"].__module__
    'corequant_transformers.exports.transformers_hook'
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = _Config
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = _Quantizer


def _read(values: Any) -> Iterator[_Online]:
    groups = values.get("config_groups", {}) if isinstance(values, dict) else None
    if not isinstance(groups, dict):
        raise CheckpointError("transform_config must hold config_groups by their names")
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("apply"), list):
            raise CheckpointError(f"transform_config's group {name!r} must have a list 'apply'")
        kind, size = group.get("type"), group.get("head_dim")
        if size is not None and (type(size) is not int or size < 1):
            raise CheckpointError(f"head_dim of {name!r} must be a positive integer, got {size!r}")
        for entry in group["apply"]:
            if not isinstance(entry, dict):
                raise CheckpointError(f"transform_config's group {name!r} must apply objects")
            location = entry.get("location")
            if location in _MERGED:
                continue
            if location not in ("input", "output") or kind not in _TYPES:
                raise CheckpointError(
                    f"transform_config's group {name!r} must be of type {' or '.join(_TYPES)} at "
                    f"input or output to be rotated at run time, got {kind!r} at {location!r}"
                )
            yield _Online(
                name,
                location,
                size,
                bool(entry.get("inverse", False)),
                _strings(name, entry.get("targets", [])),
                _strings(name, entry.get("ignore", [])),
            )


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise CheckpointError(f"targets and ignore of {name!r} must be lists of strings")
    return tuple(values)


def _named(patterns: tuple[str, ...], name: str, module: torch.nn.Module) -> bool:
    kind = type(module).__name__
    return any(
        re.match(p[3:], name) is not None if p.startswith("re:") else p in (name, kind)
        for p in patterns
    )


def _attach(model: torch.nn.Module, online: _Online) -> None:
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and online.finds(name, module)
    ]
    if not layers:
        raise CheckpointError(f"no linear layer matches the targets of {online.group!r}")
    at_input = online.location == "input"
    for name, module in layers:
        width = module.in_features if at_input else module.out_features
        size = online.size or width
        if width % size:
            raise CheckpointError(
                f"head_dim={size} of {online.group!r} must divide the width {width} of {name}"
            )
        transform = BlockTransform(size, online.inverse)
        module.register_module(f"{online.group}_{online.location}", transform)
        if at_input:
            module.register_forward_pre_hook(_InputHook(transform), prepend=True)
        else:
            module.register_forward_hook(_OutputHook(transform))


class _InputHook:
    def __init__(self, transform: BlockTransform) -> None:
        self.transform = transform

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.transform(args[0]), *args[1:])


class _OutputHook:
    def __init__(self, transform: BlockTransform) -> None:
        self.transform = transform

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.transform(output)


@torch.no_grad()
def _check_matrices(model: torch.nn.Module) -> None:
    """Refuse matrices that the files lack, Transformers would have drawn them; know ours."""
    checked: list[tuple[torch.Tensor, bool]] = []
    for name, module in model.named_modules():
        if not isinstance(module, BlockTransform) or module.weight.device.type == "meta":
            continue
        matrix = module.weight.float()
        known = next((known for other, known in checked if torch.equal(matrix, other)), None)
        if known is None:
            n = len(matrix)
            wanted = n * torch.eye(n, dtype=matrix.dtype, device=matrix.device)
            # Entries of bfloat16 carry 8 bits.
            if not bool(((matrix @ matrix.T - wanted).abs() <= 0.02 * n).all()):
                raise CheckpointError(f"{name}.weight is missing or not orthogonal")
            known = _is_known(matrix)
            checked.append((matrix, known))
        module.known = known


def _is_known(matrix: torch.Tensor) -> bool:
    """Return whether ``matrix`` (n, n) is the Hadamard matrix that corequant has of its order."""
    try:
        ours = hadamard_matrix(len(matrix))
    except HadamardOrderError:
        return False
    return torch.equal(torch.tensor(ours, dtype=matrix.dtype, device=matrix.device), matrix)

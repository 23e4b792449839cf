"""Directories that ``quantize`` wrote, for Transformers' ``from_pretrained`` and ``pipeline``.

Importing ``corequant_transformers`` enters a config and a quantizer for ``corequant`` in
Transformers' registries as soon as there are any. Without it Transformers stops at ``GUARD``, which
``config.json`` has instead of the name of the file of weights.

Transformers imports this module in the middle of its own import, so that everything else that is
needed is imported when a model is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from corequant.errors import ArchitectureError, BackendError, SpecError
from corequant_transformers.files.marks import GUARD, METHOD, WEIGHTS, check_settings

__all__ = ["CorequantConfig", "register_method"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CorequantConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The ``quantization_config`` of ``config.json``.

    Parameters
    ----------
    **values
        Fields of ``quantization_config``.

    Raises
    ------
    CheckpointError
        If they are of another version, or hold no recipe.
    """

    def __init__(self, **values: Any) -> None:
        check_settings(values, "config.json")
        self.__dict__.update(values)


class CorequantQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Transformers' loader for models of ``QuantizedLinear`` layers."""

    requires_calibration = True
    is_trainable = False
    is_compileable = True
    _assembly: Any = None

    def is_serializable(self, *given: Any, **options: Any) -> bool:
        """Return True: a loaded model has a ``save_pretrained`` of its own."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Raise BackendError if layers would be off their device whenever they aren't called."""
        places = {str(p) for p in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise BackendError(
                "device_map must not offload layers to the CPU or to disk, since their weights are "
                f"decoded once and kept, got {', '.join(sorted(places))}; load the model on "
                "devices with enough memory, or on the CPU alone"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Set the name of the file of weights; called before Transformers looks for it."""
        config.transformers_weights = WEIGHTS
        return config

    # What Transformers before 5.18 calls there.
    update_tp_plan = update_attn_implementation

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the compute dtype: the requested one, or that of ``config.json``."""
        if dtype not in _DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise SpecError(f"dtype must be one of {names}, got {dtype}")
        return dtype

    def update_weight_conversions(self, conversions: Any, model: Any = None) -> list[Any]:
        """Return no conversions: modules are given the layout that is stored."""
        return []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from corequant_transformers.checkpoint.assembly import Assembly

        if getattr(model.config, "distributed_config", None) is not None:
            raise BackendError(
                "tp_plan and distributed_config must be left out: a model that corequant quantized "
                "isn't spread over processes"
            )
        settings = self.quantization_config.to_dict()
        self._assembly = Assembly(model, settings, kwargs.get("checkpoint_files"))
        model.config.transformers_weights = GUARD

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assembly, self._assembly = self._assembly, None
        if assembly is not None:
            assembly.finish(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        raise ArchitectureError(
            "dequantize has no float model to return, since layers may rotate and round their "
            "inputs; the decoded weight of each QuantizedLinear is its attribute weight"
        )


def register_method() -> None:
    """Register config and quantizer with Transformers; idempotent."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(CorequantConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(CorequantQuantizer)

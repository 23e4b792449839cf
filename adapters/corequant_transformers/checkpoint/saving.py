"""``save_pretrained`` of a loaded model, which writes a directory like its own."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corequant.errors import OutputError
from corequant.storage.files import json_text, read_text
from corequant_transformers.checkpoint.writer import save
from corequant_transformers.files.atomic import read_json
from corequant_transformers.model.parts import is_tied
from corequant_transformers.model.surroundings import undisturbed
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["Saving"]

_NAME = "save_pretrained"

_REFUSED = {
    "state_dict": None,
    "push_to_hub": False,
    "variant": None,
    "distributed_checkpoint": False,
}
"""Options of Transformers' ``save_pretrained`` that would change what is written, by default."""

_IGNORED = (
    *("is_main_process", "max_shard_size", "safe_serialization", "save_function", "token"),
    *("save_peft_format", "save_original_format"),
)


@dataclass(frozen=True)
class _Origin:
    """The contents of a directory other than the model itself."""

    plan: ModelPlan
    float_config: str
    report: dict[str, Any]


class Saving:
    """The method ``save_pretrained`` of one model.

    A model that is no longer used gives its memory back at once, so that the model isn't referred
    to by what it has. ``load(path).save_pretrained(other)`` finds its parts instead, when the model
    itself is gone.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    origin : _Origin
    parts : transformers.PreTrainedModel, optional
        A model of the same modules and config; made by default.
    """

    def __init__(self, model: Any, origin: _Origin, parts: Any = None) -> None:
        self._model = weakref.ref(model)
        self._origin = origin
        if parts is None:
            parts = object.__new__(type(model))
            parts.__dict__.update(model.__dict__)
        self._parts = parts

    @classmethod
    def of(cls, model: Any, plan: ModelPlan, folder: Path) -> Saving:
        """Return the method for a model that was loaded from a directory."""
        file, report = folder / "float_config.json", folder / "report.json"
        # Transformers fetches the weights and config.json alone from the Hub.
        text = read_text(file) if file.exists() else _float_config(folder)
        model.__dict__.pop(_NAME, None)
        told = read_json(report) if report.exists() else {}
        # The model may be changed before it is saved.
        told.pop("evaluation", None)
        return cls(model, _Origin(plan, text, told))

    def __deepcopy__(self, memo: dict[int, Any]) -> Saving:
        parts = copy.deepcopy(self._parts, memo)
        return Saving(memo.get(id(self._model()), parts), self._origin, parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Saving, (self._model() or self._parts, self._origin, self._parts)

    @undisturbed()
    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        """Write the model to a new or empty directory; its tokenizer is saved separately.

        Parameters
        ----------
        save_directory : str or Path
        **options
            Options of Transformers' own method; ``max_shard_size`` has no effect.

        Raises
        ------
        OutputError
            If it can't be written or doesn't read back equal, or for an option that can't be
            followed; nothing is left then.
        """
        for name, value in options.items():
            if name in _REFUSED and value == _REFUSED[name]:
                continue
            if name not in _IGNORED:
                raise OutputError(
                    f"save_pretrained must be called without {name} for a model that corequant "
                    f"quantized, got {str(value)[:40]!r}; nothing was written"
                )
        if options.get("is_main_process", True) is False:
            return
        model, origin = self._model() or self._parts, self._origin
        dtype = str(model.dtype).removeprefix("torch.")
        save(
            model,
            # The head may have been given a matrix of its own meanwhile.
            replace(origin.plan, tied=origin.plan.tied and is_tied(model, origin.plan)),
            save_directory,
            report=origin.report,
            float_config=origin.float_config,
            dtype=dtype,
        )


def _float_config(folder: Path) -> str:
    values = read_json(folder / "config.json")
    own = ("quantization_config", "transformers_weights")
    return json_text({k: v for k, v in values.items() if k not in own})

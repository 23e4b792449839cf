"""The model card of a written model: ``README.md``, for the Hugging Face Hub and for people.

It says what the model is, how it is loaded, what is stored, how it was made and what was measured.
It names no place on the machine that wrote it, and two runs that make the same model make the same
card.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corequant.storage.files import version_of
from corequant.storage.tensor_file import TensorFile
from corequant_transformers.checkpoint.figures import evaluation_section, plain_name
from corequant_transformers.planning.matrix_plan import MatrixPlan
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = ["exported_card", "own_card"]

_VERSIONS = {"corequant": "corequant", "torch": "torch", "transformers": "Transformers"}
_VERSIONS["numpy"] = "NumPy"
_HUB = "https://huggingface.co/"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_USE_OWN = """\
```bash
pip install "corequant[transformers]"
```

```python
import corequant_transformers  # lets Transformers read this format
from transformers import pipeline

# This directory, or its id on the Hub.
GENERATE
```

`LOADER.from_pretrained(".")` and `corequant_transformers.load(".")` load the same
model; `corequant export . -o OUT` writes it for other programs.
"""

_USE_EXPORTED = """\
```bash
pip install {packages}
```

```python
{first}from transformers import pipeline

# This directory, or its id on the Hub.
GENERATE
```
"""

_USE_ENCLOSED = """\
```bash
pip install "corequant[transformers]"
```

```python
import corequant_transformers as cqhf

model, tokenizer = cqhf.load("."), cqhf.load_tokenizer(".")
print(model(**tokenizer("A sentence.", return_tensors="pt"))[0])
```

`from_pretrained(".")` of the model's own class loads the same.
"""
_GENERATE = {
    "text-generation": """\
generate = pipeline("text-generation", ".")
print(generate("The capital of France is", max_new_tokens=20)[0]["generated_text"])""",
    "image-text-to-text": """\
answer = pipeline("image-text-to-text", ".")
image = {"type": "image", "url": "photo.jpg"}
question = {"type": "text", "text": "What is this?"}
print(answer(text=[{"role": "user", "content": [image, question]}], max_new_tokens=20))""",
}
_LOADERS = {
    "text-generation": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
}

_ROTATING = "import corequant_transformers  # lets Transformers rotate at run time\n"
_SERVED = "\nvLLM reads it, too: `vllm serve .`\n"
_SERVABLE = {"pack-quantized", "int-quantized"}
_RARE = {"shared": "for all tokens of their layer", "nearest": "to nearest"}


@dataclass(frozen=True)
class _Card:
    """A model card.

    Attributes
    ----------
    plan : ModelPlan
    report : mapping
        Report of the run that made the model; may be empty.
    use : str
        How the model is loaded, in Markdown.
    kind : str
        What kind of directory it is, a noun phrase.
    """

    plan: ModelPlan
    report: Mapping[str, Any]
    use: str
    kind: str

    def text(self, files: Iterable[Path]) -> str:
        """Return the card.

        Parameters
        ----------
        files : iterable of Path
            Files of weights.
        """
        sizes, dtypes = _stored(files)
        parts = [
            self._front(),
            f"# {self._name}, quantized to {' and '.join(self._formats)}\n",
            self._summary(sizes),
            f"## Use\n\n{self._use()}",
            f"## Contents\n\n{self._contents(sizes, dtypes)}",
            f"## Recipe\n\n{self._recipe()}",
            evaluation_section(self.report.get("evaluation")),
        ]
        return "\n".join(parts)

    @property
    def _task(self) -> str:
        if self.plan.architecture.enclosed:
            return "feature-extraction"
        return "image-text-to-text" if self.plan.architecture.outside else "text-generation"

    def _use(self) -> str:
        if self.plan.architecture.enclosed:
            return _USE_ENCLOSED
        text = self.use.replace("GENERATE", _GENERATE[self._task])
        return text.replace("LOADER", _LOADERS[self._task])

    @property
    def _name(self) -> str:
        name = self.report.get("source")
        if not isinstance(name, str) or not name:
            return f"A {plain_name(self.plan.architecture.model_type)} model"
        return plain_name(name.removesuffix(".gguf"))

    @property
    def _formats(self) -> list[str]:
        return sorted({m.weights.format.name for m in self.plan.quantized})

    @property
    def _origin(self) -> Mapping[str, str]:
        found = self.report.get("origin")
        return found if isinstance(found, dict) else {}

    def _front(self) -> str:
        base, licence = self._origin.get("base_model"), self._origin.get("license")
        values: dict[str, Any] = {}
        if base:
            values |= {"base_model": base, "base_model_relation": "quantized"}
        values["library_name"] = "transformers"
        if licence:
            values["license"] = licence
        values["pipeline_tag"] = self._task
        values["tags"] = ["corequant", *self._formats]
        # JSON's texts and lists are YAML's, too.
        lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
        return "\n".join(["---", *lines, "---", ""])

    def _summary(self, sizes: Mapping[str, int]) -> str:
        plan, base = self.plan, self._origin.get("base_model")
        made_of = f"[{base}]({_HUB}{base})" if base else f"`{self._name}`"
        if self._name.startswith("A "):
            made_of = f"a model of the type `{plain_name(plan.architecture.model_type)}`"
        layers = [m for m in plan.quantized if m.role not in ("embedding", "head")]
        bits = 8 * _bytes(sizes, layers) / _parameters(layers)
        return (
            f"This is {made_of} with the weights of {len(layers)} linear layers in "
            f"{bits:.3g} bits each, scales included, written by corequant as {self.kind}. Its "
            f"weights take {_megabytes(sum(sizes.values()))}.{self._rotation}\n"
        )

    @property
    def _rotation(self) -> str:
        rows = self.plan.online
        if not rows:
            return ""
        sizes = [(m.input.rotation or 0, m.shape[1]) for m in rows]
        blocks = sorted({size for size, width in sizes if size != width})
        how = f"by blocks of {' or '.join(map(str, blocks))}" if blocks else "over their full width"
        return f" The inputs of {len(rows)} layers are rotated at run time, {how}."

    def _contents(self, sizes: Mapping[str, int], dtypes: Mapping[str, str]) -> str:
        lines = ["| what | format | inputs | parameters | bits each | size |"]
        lines.append("|---|---|---|--:|--:|--:|")
        for (what, form, inputs), rows in _grouped(self.plan, dtypes).items():
            lines.append(_line(what, form, inputs, _parameters(rows), _bytes(sizes, rows)))
        known = [f"{m.name}." for m in self.plan.matrices]
        rest = {n: s for n, s in sizes.items() if not n.startswith(tuple(known))}
        if rest:
            size = sum(rest.values())
            kinds = ", ".join(f"`{kind}`" for kind in sorted({dtypes[name] for name in rest}))
            lines.append(f"| norms and the rest | {kinds} | | | | {_megabytes(size)} |")
        return "\n".join(lines) + "\n"

    def _recipe(self) -> str:
        versions = ", ".join(f"{name} {version_of(p)}" for p, name in _VERSIONS.items())
        tokens = self.report.get("calibration_tokens")
        read = f" with {tokens:,} tokens of text" if isinstance(tokens, int) and tokens else ""
        return (
            f"Made by `corequant quantize MODEL --recipe recipe.toml -o OUT`{read}, by {versions}. "
            f"This is `recipe.toml`:\n\n```toml\n{self.plan.recipe.to_toml().strip()}\n```\n"
            f"{self._on_the_way()}"
        )

    def _on_the_way(self) -> str:
        lines = [f"- {line}\n" for line in (*self._verified(), *self._rounded())]
        return "".join(["\nMeasured on the way:\n\n", *lines]) if lines else ""

    def _verified(self) -> Iterator[str]:
        found = self.report.get("verification")
        error = found.get("logits_error") if isinstance(found, dict) else None
        if isinstance(error, float):
            yield (
                "Before rounding, the transformed model's logits differed from the float model's "
                f"by {error:.1e} of the largest."
            )

    def _rounded(self) -> Iterator[str]:
        rows = self.report.get("matrices")
        ratios: dict[str, list[float]] = {}
        for row in rows if isinstance(rows, list) else []:
            loss, nearest = row.get("loss"), row.get("loss_nearest")
            if loss is not None and nearest:
                ratios.setdefault(str(row.get("method")), []).append(loss / nearest)
        for how, words in _RARE.items():
            rare = [row for row in rows if row.get("rare") == how] if isinstance(rows, list) else []
            if rare:
                yield (
                    f"{len(rare)} layers of experts that fewer than "
                    f"{self.plan.recipe.expert_tokens} calibration tokens reached were rounded "
                    f"{words}."
                )
        for method, values in sorted(ratios.items()):
            yield (
                f"Rounding by `{method}` left {statistics.median(values):.2g} of the squared error "
                f"of rounding to nearest, measured on the outputs that each of {len(values)} "
                "layers has in calibration (median)."
            )


def own_card(plan: ModelPlan, report: Mapping[str, Any], weights: Path) -> str:
    """Return the card of a directory that ``quantize`` writes.

    Parameters
    ----------
    plan : ModelPlan
    report : mapping
    weights : Path
        The file of weights.
    """
    return _Card(plan, report, _USE_OWN, "a directory of its own format").text([weights])


def exported_card(
    plan: ModelPlan, report: Mapping[str, Any], files: Iterable[Path], formats: set[str]
) -> str:
    """Return the card of a directory that is written in the layout of compressed-tensors.

    Parameters
    ----------
    plan : ModelPlan
    report : mapping
        Report of the run that made the model.
    files : iterable of Path
        Files of weights.
    formats : set of str
        compressed-tensors' names of the layers' formats.
    """
    rotates = bool(plan.online)
    packages = '"corequant[transformers]"' if rotates else "transformers accelerate"
    use = _USE_EXPORTED.format(
        packages=f"{packages} compressed-tensors", first=_ROTATING if rotates else ""
    )
    if not rotates and formats <= _SERVABLE:
        use += _SERVED
    kind = f"a directory of compressed-tensors ({', '.join(sorted(formats))})"
    return _Card(plan, report, use, kind).text(files)


def _stored(files: Iterable[Path]) -> tuple[dict[str, int], dict[str, str]]:
    """Return the bytes and the dtype of each tensor."""
    sizes, dtypes = {}, {}
    for path in files:
        file = TensorFile(path)
        for name in file.names:
            tensor = file.read(name)
            sizes[name] = tensor.data.nbytes
            dtypes[name] = _DTYPES.get(tensor.dtype, tensor.dtype)
    return sizes, dtypes


def _grouped(
    plan: ModelPlan, dtypes: Mapping[str, str]
) -> dict[tuple[str, str, str], list[MatrixPlan]]:
    """Return the matrices grouped by kind, format and format of their inputs."""
    groups: dict[tuple[str, str, str], list[MatrixPlan]] = {}
    for matrix in plan.matrices:
        if matrix.role in ("embedding", "head"):
            if plan.tied and matrix.role == "head":
                continue
            what = "embedding and head" if plan.tied else matrix.role
        else:
            what = "linear layers"
        inputs = "float"
        form = dtypes.get(f"{matrix.name}.weight", plan.recipe.dtype)
        if matrix.quantized:
            form = str(matrix.weights)
            inputs = "float" if matrix.activations is None else f"`{matrix.activations}`"
        groups.setdefault((what, f"`{form}`", inputs), []).append(matrix)
    counts = Counter(what for what, *_ in groups)
    named = {}
    for (what, form, inputs), rows in groups.items():
        several = what == "linear layers" or counts[what] > 1
        named[f"{len(rows)} {what}" if several else what, form, inputs] = rows
    return named


def _bytes(sizes: Mapping[str, int], rows: Iterable[MatrixPlan]) -> int:
    starts = tuple(f"{m.name}.weight" for m in rows)
    return sum(size for name, size in sizes.items() if name.startswith(starts))


def _parameters(rows: Iterable[MatrixPlan]) -> int:
    return sum(m.shape[0] * m.shape[1] for m in rows)


def _line(what: str, form: str, inputs: str, count: int, size: int) -> str:
    bits = 8 * size / count
    return f"| {what} | {form} | {inputs} | {count:,} | {bits:.3g} | {_megabytes(size)} |"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 1e3 else f"{size} bytes"

"""Models opened one part at a time: embedding, decoder blocks, final norm with the head.

The model itself is a skeleton: real Transformers classes whose parameters are on torch's meta
device and take no memory. Opening a part loads its weights within a context, from the
model's files or from a model in memory, so that quantizing needs one part at a time either way.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
import transformers

from corequant.quantization import QuantizedTensor
from corequant_transformers.architectures.experts import Experts
from corequant_transformers.architectures.known import keep_architecture, own_config
from corequant_transformers.model.expert_list import ExpertList, check_experts
from corequant_transformers.model.layouts import check_modules, standardize, standardized
from corequant_transformers.model.loaders import make_model
from corequant_transformers.model.quantized_linear import QuantizedWeight
from corequant_transformers.model.replicas import replicate
from corequant_transformers.model.streamed_experts import (
    StreamedExperts,
    experts_of,
    reads_experts,
    streamed_experts,
)
from corequant_transformers.model.surroundings import check_finite, quiet_transformers, trim_memory
from corequant_transformers.planning.model_plan import ModelPlan

__all__ = [
    "ENTRY",
    "EXIT",
    "OUTSIDE",
    "ModelWeights",
    "Part",
    "Parts",
    "Weights",
    "build",
    "codes_of_embedding",
    "is_rounded",
    "is_tied",
    "part_of",
    "part_plan",
    "skeleton",
    "tie",
    "untie",
]

Part = int | Literal["outside", "entry", "exit"]
"""Index of a decoder block, or ``ENTRY`` (embedding), or ``EXIT`` (final norm and head), or
``OUTSIDE`` (modules outside of the decoder)."""

OUTSIDE: Literal["outside"] = "outside"

ENTRY: Literal["entry"] = "entry"
EXIT: Literal["exit"] = "exit"


class Weights(Protocol):
    """Where a skeleton's parts get their weights from."""

    def fill(self, model: Any, keys: Sequence[str]) -> None:
        """Set the parameters of these names in the modules of ``model``, in float32."""
        ...


class ModelWeights:
    """The weights of a float model in memory, which is only read."""

    def __init__(self, model: Any) -> None:
        # Its own names, without what wraps it or its modules, or hooks make of them.
        self._state = torch.nn.Module.state_dict(replicate(model))

    def fill(self, model: Any, keys: Sequence[str]) -> None:
        """Set the parameters of these names in the modules of ``model``, in float32."""
        for key in keys:
            # Nothing writes into a weight: whatever is transformed is a new tensor.
            value = self._state[key].detach().to(torch.float32)
            path, _, name = key.rpartition(".")
            module = model.get_submodule(path)
            if name in module._buffers:
                module._buffers[name] = value
            else:
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


class Parts:
    """A skeleton and where its weights come from.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A skeleton. Its head gets a matrix of its own where it shares the embedding's.
    plan : ModelPlan
        Tells the modules of each part.
    weights : Weights
    device : str or torch.device
        Device of open parts.
    spare : int
        Bytes that the process may have before memory is returned to the system after each part.

    Attributes
    ----------
    model : transformers.PreTrainedModel
    keys : dict of Part to list of str
        Names of the parameters of each part.
    takes_tuples : bool, optional
        Whether blocks give tuples; None until it is found out.

    Raises
    ------
    ArchitectureError
        If a matrix or norm of the plan is not in the model.
    """

    def __init__(
        self,
        model: Any,
        plan: ModelPlan,
        weights: Weights,
        device: str | torch.device = "cpu",
        spare: int = 0,
    ) -> None:
        self.model = model
        self.takes_tuples: bool | None = None
        self.spare = spare
        self.weights = weights
        self.plan = plan
        self.device = torch.device(device)
        keep_architecture(model, plan.architecture)
        _move_buffers(model, self.device)
        if not plan.architecture.enclosed:
            untie(model, plan)
        self.keys: dict[Part, list[str]] = {part: [] for part in self.order}
        for name in model.state_dict():
            self.keys[part_of(name, plan)].append(name)
        with standardized(model, plan):
            check_modules(plan, {name: tuple(t.shape) for name, t in model.state_dict().items()})

    @property
    def blocks(self) -> range:
        """Indices of the decoder blocks."""
        return range(self.plan.dimensions.blocks)

    @property
    def order(self) -> list[Part]:
        """All parts in the order in which a token meets them, what lies outside first."""
        return [*_outside_of(self.plan), ENTRY, *self.blocks, EXIT]

    def block(self, index: int) -> Any:
        """Return a decoder block's module."""
        return self.model.get_submodule(self.plan.architecture.block_path(index))

    @contextmanager
    def open(self, part: Part) -> Iterator[Any]:
        """Load a part's weights in float32, and drop them with all changes at the end.

        Meanwhile its modules are in the layout of ``layouts.standardize``.

        Raises
        ------
        CheckpointError
            If they can't be read.
        NonFiniteError
            If one holds NaN or infinity.
        """
        self.model.float()
        paths = self.modules(part)
        closed = {path: self.model.get_submodule(path) for path in paths}
        try:
            for path, module in closed.items():
                self.model.set_submodule(path, copy.deepcopy(module))
            streamed = self._streamed(part)
            keys = [k for k in self.keys[part] if not streamed or k.rpartition(".")[0] != streamed]
            self.weights.fill(self.model, keys)
            options = {"make": self._stream} if streamed else {}
            replaced = standardize(self.model, part_plan(self.plan, part), **options)
            for path in paths:
                module = self.model.get_submodule(path).to(self.device)
                for name, tensor in module.named_parameters():
                    if not streamed or not f"{path}.{name}".startswith(f"{streamed}."):
                        check_finite(f"{path}.{name}", tensor)
            for path, fused in replaced.items():
                made = self.model.get_submodule(path)
                if isinstance(made, StreamedExperts):
                    check_experts(*made.few())
                elif isinstance(made, ExpertList):
                    check_experts(fused.to(self.device), made)
            del replaced
            yield self.model
        finally:
            opened = [weakref.ref(self.model.get_submodule(path)) for path in paths]
            for path, module in closed.items():
                self.model.set_submodule(path, module)
            _give_back(opened, self.spare)

    def _streamed(self, part: Part) -> str | None:
        """Return the path of a part's experts if they are read few at a time; None otherwise."""
        if not isinstance(part, int) or not self.plan.experts_at_once(part):
            return None
        paths = {key: experts_of(key, self.plan) for key in self.keys[part]}
        fused = {key: path for key, path in paths.items() if path is not None}
        if not fused or not reads_experts(self.weights, self.plan, fused):
            return None
        return next(iter(fused.values()))

    def _stream(self, fused: Any, experts: Experts, path: str) -> StreamedExperts:
        block = self.plan.architecture.block_index(f"{path}.")
        weights: Any = self.weights

        def read(name: str, index: int) -> torch.Tensor:
            part: torch.Tensor = weights.expert(f"{path}.{name}", index)
            return part

        return StreamedExperts(fused, experts, path, read, self.plan.experts_at_once(block or 0))

    def experts(self, index: int) -> StreamedExperts | None:
        """Return an open block's experts if they are read few at a time; None otherwise."""
        return streamed_experts(self.block(index)) if self.plan.experts_at_once(index) else None

    def modules(self, part: Part) -> list[str]:
        """Return the paths of the modules that a part is made of."""
        if isinstance(part, int):
            return [self.plan.architecture.block_path(part)]
        if part == OUTSIDE:
            return list(self.plan.architecture.outside)
        return sorted({key.rpartition(".")[0] for key in self.keys[part]})


def part_plan(plan: ModelPlan, part: Part) -> ModelPlan:
    """Return the rows and norms of a plan that belong to a part."""
    matrices = tuple(m for m in plan.matrices if part_of(f"{m.name}.", plan) == part)
    norms = tuple(n for n in plan.norms if part_of(f"{n}.", plan) == part)
    writers = plan.writers if part == OUTSIDE else ()
    return replace(plan, matrices=matrices, norms=norms, writers=writers)


def part_of(name: str, plan: ModelPlan) -> Part:
    """Return the part that a parameter or, with a dot at its end, a module belongs to."""
    block = plan.architecture.block_index(name)
    if block is not None:
        return block
    for path in () if plan.architecture.enclosed else _exits(plan):
        if name.startswith(f"{path}."):
            return EXIT
    if any(name.startswith(f"{path}.") for path in plan.architecture.outside):
        return OUTSIDE
    return ENTRY


def _exits(plan: ModelPlan) -> tuple[str, ...]:
    return plan.architecture.final_norm, plan.architecture.head


def _outside_of(plan: ModelPlan) -> list[Part]:
    return [OUTSIDE] if plan.architecture.outside else []


def _give_back(modules: Sequence[weakref.ref[torch.nn.Module]], spare: int) -> None:
    """Return freed memory to the system: otherwise what each part leaves behind adds up."""
    # Only where something still holds a part: looking for cycles among all objects of the process
    # takes longer than a small part itself.
    if any(module() is not None for module in modules):
        gc.collect()
    trim_memory(spare)


def _move_buffers(model: Any, device: torch.device) -> None:
    """Move a skeleton's buffers to the device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def is_tied(model: Any, plan: ModelPlan) -> bool:
    """Return whether embedding and head are one matrix."""
    a = plan.architecture
    embedding, head = model.get_submodule(a.embedding), model.get_submodule(a.head)
    if isinstance(head, QuantizedWeight) and isinstance(embedding, QuantizedWeight):
        return head.quantized is embedding.quantized
    return head.weight is embedding.weight


def codes_of_embedding(model: Any, plan: ModelPlan) -> QuantizedTensor:
    """Return the codes of a quantized embedding, which a tied head shares."""
    found: QuantizedTensor = model.get_submodule(plan.architecture.embedding).quantized
    return found


def untie(model: Any, plan: ModelPlan) -> None:
    """Give the head a matrix of its own if it shares the embedding's."""
    if is_tied(model, plan):
        head = model.get_submodule(plan.architecture.head)
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def tie(model: Any, plan: ModelPlan) -> None:
    """Give the head the embedding's matrix."""
    embedding = model.get_submodule(plan.architecture.embedding)
    model.get_submodule(plan.architecture.head).weight = embedding.weight
    model.config.tie_word_embeddings = True


def skeleton(model: Any) -> Any:
    """Return a model's structure with its parameters on the meta device.

    Parameters
    ----------
    model : transformers.PreTrainedModel or transformers.PreTrainedConfig
        A model is left as it is.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode, float32, with buffers that don't come from files in place.
    """
    if isinstance(model, torch.nn.Module):
        result: Any = replicate(model, _emptied, plain=True)
        result.config.architectures = own_config(result).architectures
        result.config.return_dict = True
        _settle_buffers(result)
        return result
    result = build(model)
    for owner, module in _with_owners(result):
        module._buffers.update(_computed_buffers(owner, module))
    _compute_buffers_from_above(result)
    return result.eval().requires_grad_(False)


def _with_owners(model: Any, owner: Any = None) -> Iterator[tuple[Any, torch.nn.Module]]:
    """Yield all modules, each with the model of Transformers that it is directly a part of."""
    owner = model if isinstance(model, transformers.PreTrainedModel) else owner
    if owner is not None:
        yield owner, model
    for child in model.children():
        yield from _with_owners(child, owner)


def _computed_buffers(model: Any, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's buffers as Transformers computes them when it loads a model."""
    own = {name: b for name, b in module._buffers.items() if b is not None}
    if not own:
        return {}
    fresh: Any = copy.copy(module)
    made = {
        name: (
            torch.full_like(b, torch.nan, device="cpu", dtype=torch.float32)
            if b.is_floating_point()
            else torch.empty_like(b, device="cpu")
        )
        for name, b in own.items()
    }
    fresh.__dict__["_buffers"] = {**module._buffers, **made}
    model._init_weights(fresh)
    return {name: fresh._buffers[name] for name in own}


def _compute_buffers_from_above(model: Any) -> None:
    """Compute in place the buffers that a module around theirs computes when a model is loaded."""
    absent = {
        path
        for path, module in model.named_modules()
        for b in module._buffers.values()
        if b is not None and b.is_floating_point() and not b.is_meta and bool(b.isnan().any())
    }
    if not absent:
        return
    around = {id(model)}
    for path, module in model.named_modules():
        if any(name.startswith(f"{path}.") for name in absent):
            around.add(id(module))
    for owner, module in _with_owners(model):
        if id(module) in around:
            owner._init_weights(module)


def _settle_buffers(model: Any) -> None:
    """Undo in place what a cast of the model rounded that loading would compute in float32."""
    for owner, module in _with_owners(model):
        own = {n for n in module._non_persistent_buffers_set if module._buffers[n] is not None}
        if not own:
            continue
        computed = _computed_buffers(owner, module)
        for name in own:
            there: Any = module._buffers[name]
            if is_rounded(there, computed[name]):
                module._buffers[name] = computed[name].to(there.device)


def is_rounded(found: torch.Tensor, computed: torch.Tensor) -> bool:
    """Return whether a buffer differs from the one that loading computes by rounding alone."""
    there = found.detach().cpu()
    if there.shape != computed.shape or there.is_floating_point() != computed.is_floating_point():
        return False
    if not computed.is_floating_point():
        return torch.equal(there, computed)
    there = there.float()
    # Devices differ in the last bits of powers.
    if torch.allclose(there, computed, rtol=1e-6, atol=0):
        return True
    half, brain = torch.float16, torch.bfloat16
    casts = [computed.to(a).to(b).float() for a in (half, brain) for b in (half, brain)]
    return any(torch.equal(there, cast) for cast in casts)


def build(config: Any) -> Any:
    """Return a model of a config, in float32, with all of it on the meta device.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Copied.
    """
    config = copy.deepcopy(config)
    # Transformers would make a dtype that it is told the process's own while it builds.
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if each is not None:
            each.dtype = None
    with quiet_transformers(), torch.device("meta"):
        result: Any = make_model(config)
    result.config.dtype = torch.float32
    return torch.nn.Module.float(result)


def _emptied(parameter: torch.Tensor) -> torch.Tensor:
    there = parameter.detach().to("meta", torch.float32)
    return torch.nn.Parameter(there, requires_grad=False)

"""A draft description of a model that no description fits, from names, shapes and one block.

The first block is run once on random hidden states with random weights. Which tensor a module reads
and which one it writes tells which norm stands in front of which layers; names tell the layers
themselves. Whatever stays open is said in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from corequant.errors import ArchitectureError
from corequant_transformers.architectures.description import NORMS, Architecture
from corequant_transformers.model.recognition import norm_behaves
from corequant_transformers.model.replicas import standing_in
from corequant_transformers.transforms.rehearsal import RandomWeights

__all__ = ["guess"]

_MOST_WEIGHTS = 2**30
"""Of a block that is run."""

_TOKENS = 8
_ABSENT = "?"
_QKV = "w?qkv|c_attn|query_key_value|qkv_proj|in_proj"
_GATE_UP = "gate_up_proj|gate_up"
_NAMES = {
    "query": f"wq|q|query|q_proj|queries|{_QKV}",
    "key": f"wk|k|key|k_proj|keys|{_QKV}",
    "value": f"wv|v|value|v_proj|values|{_QKV}",
    "gate": f"w1|gate|gate_proj|wi_0|{_GATE_UP}",
    "up": f"w3|up|up_proj|fc1|fc_in|c_fc|dense_h_to_4h|lin1|wi_1|wi|{_GATE_UP}",
    "down": "w2|down|down_proj|fc2|fc_out|dense_4h_to_h|lin2|wo|c_proj",
    "attention_output": "wo|o|o_proj|out_proj|c_proj|dense|out|proj",
}
"""Last parts of the paths of layers, in lower case."""

_WIDTHS = ("inter", "inner", "ffn", "mlp", "ff")


def guess(model: Any) -> tuple[Architecture | None, list[str]]:
    """Return a draft description and its open questions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A skeleton; it is used up.

    Returns
    -------
    architecture : Architecture or None
        None if not even the blocks were found.
    unclear : list of str
        Sentences.
    """
    unclear: list[str] = []
    blocks = _blocks(model)
    if blocks is None:
        return None, ["no list of blocks with linear layers was found"]
    block = model.get_submodule(blocks.format(0))
    found: dict[str, Any] = {"block": blocks, **_outer(model, blocks, unclear)}
    layers = {n: m for n, m in _leaves(block) if getattr(m, "weight", None) is not None}
    linear = {n: m for n, m in layers.items() if m.weight.ndim == 2}
    norms = {n: m for n, m in layers.items() if m.weight.ndim == 1}
    found |= _layers(linear, unclear)
    found |= _facts(model.config, block, linear, found, unclear)
    found |= _norms(_reads(model, blocks, found, unclear), found, norms, unclear)
    used = {value for value in found.values() if isinstance(value, str)}
    inner = [name for name in layers if name not in used]
    usual = Architecture("").inner
    found["inner"] = tuple(dict.fromkeys([*usual, *inner])) if inner else usual
    rest = [n for n in inner if n not in usual]
    if rest:
        unclear.append(
            f"inner lists {', '.join(rest)}, whose role was not found; nothing that the residual "
            "stream passes through may be listed there"
        )
    try:
        made = Architecture(model.config.model_type, **found)
    except ArchitectureError as error:
        return None, [*unclear, f"what was found contradicts itself: {error}"]
    return _with_norm(model, made, unclear), unclear


def _leaves(module: Any) -> Iterator[tuple[str, Any]]:
    for name, each in module.named_modules():
        if name and not any(True for _ in each.children()):
            yield name, each


def _blocks(model: Any) -> str | None:
    """Return the path of block i: the list of modules with the most weights."""
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module):
            sizes[name] = sum(p.numel() for p in module.parameters())
    return f"{max(sizes, key=lambda name: sizes[name])}.{{}}" if any(sizes.values()) else None


def _outer(model: Any, blocks: str, unclear: list[str]) -> dict[str, Any]:
    """Return what lies outside of the blocks."""
    within = blocks.removesuffix("{}")
    found: dict[str, Any] = {}
    outside = [(n, m) for n, m in _leaves(model) if not n.startswith(within)]
    rows = model.config.vocab_size
    whole = [(n, m) for n, m in outside if _shape(m)[:1] == (rows,) and len(_shape(m)) == 2]
    for name, is_table in (("embedding", True), ("head", False)):
        paths = [n for n, m in whole if isinstance(m, torch.nn.Embedding) == is_table]
        if paths:
            found[name] = paths[0]
        if len(paths) != 1:
            named = ", ".join(paths) or "none"
            unclear.append(f"{name} must have a row for each of {rows} tokens; candidates: {named}")
    width = _width(model, found)
    known = set(found.values())
    tables = [n for n, m in outside if isinstance(m, torch.nn.Embedding) and n not in known]
    if tables:
        found["positions"] = tables[0]
        unclear.append(f"positions may be {tables[0]}; extra_positions counts its additional rows")
    last = [n for n, m in outside if _shape(m) == (width,)]
    if not last:
        unclear.append("final_norm was not found: no module outside of the blocks has its weight")
    else:
        found["final_norm"] = last[-1]
        if len(last) > 1:
            unclear.append(f"final_norm may be any of {', '.join(last)}")
    return found


def _shape(module: Any) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return () if weight is None else tuple(weight.shape)


def _width(model: Any, found: dict[str, Any]) -> int:
    """Return the channels of the residual stream."""
    if "embedding" in found:
        return int(model.get_submodule(found["embedding"]).weight.shape[-1])
    return int(getattr(model.config, "hidden_size", 0))


def _layers(linear: dict[str, Any], unclear: list[str]) -> dict[str, Any]:
    """Return the linear layers of a block by their names."""
    found: dict[str, Any] = {}
    for field, pattern in _NAMES.items():
        taken, named = _others(found, field), re.compile(rf"(^|[._])({pattern})$")
        names = [n for n in linear if named.search(n.lower()) and n not in taken]
        if field in ("down", "attention_output") and len(names) > 1:
            part = found.get("up" if field == "down" else "query", "").rpartition(".")[0]
            names = [n for n in names if n.rpartition(".")[0] == part] or names
        if field == "gate" and not names:
            found[field] = None
        elif not names:
            unclear.append(f"{field} was not found; linear layers are {', '.join(linear)}")
        else:
            found[field] = names[0]
            if len(names) > 1:
                unclear.append(f"{field} may be any of {', '.join(names)}")
    if found.get("query") == found.get("key") == found.get("value") and "query" in found:
        unclear.append(
            f"rows of {found['query']} are assumed to be all queries, then all keys, then all "
            "values; otherwise set qkv_order and qkv_groups"
        )
    if found.get("gate") is not None and found.get("gate") == found.get("up"):
        unclear.append(f"rows of {found['up']} are assumed to be gate, then up")
    return found


def _others(found: dict[str, Any], field: str) -> set[str]:
    """Return the layers that already have another role; query, key and value may share one."""
    together = ({"query", "key", "value"}, {"gate", "up"})
    own = next((group for group in together if field in group), {field})
    return {name for other, name in found.items() if other not in own and isinstance(name, str)}


def _facts(
    config: Any, block: Any, linear: dict[str, Any], found: dict[str, Any], unclear: list[str]
) -> dict[str, Any]:
    """Return the fields that follow from shapes."""
    facts: dict[str, Any] = {}
    classes = {type(module).__name__ for module in linear.values()}
    facts["transposed"] = "Conv1D" in classes
    down = linear.get(found.get("down", ""))
    if down is not None:
        width = down.weight.shape[0 if facts["transposed"] else 1]
        fields = [n for n, v in vars(config).items() if type(v) is int and v == width]
        named = [n for n in fields if any(word in n for word in _WIDTHS)] or fields
        if named:
            facts["intermediate_size"] = named[0]
        else:
            unclear.append(f"no field of the config is {width}, the inputs of {found['down']}")
    if any(p.ndim == 3 for p in block.parameters()) or "experts" in dict(block.named_modules()):
        unclear.append("the first block has experts, which experts=Experts(...) describes")
    return facts


# ---- what the first block reads and writes


def _reads(
    model: Any, blocks: str, found: dict[str, Any], unclear: list[str]
) -> dict[str, tuple[int, int]]:
    """Return the storages that each module of the first block reads and writes."""
    block = model.get_submodule(blocks.format(0))
    if sum(p.numel() for p in block.parameters()) > _MOST_WEIGHTS or "embedding" not in found:
        unclear.append("the first block was not run, so norms are identified by name only")
        return {}
    seen: dict[str, tuple[int, int]] = {}
    kept: list[Any] = []
    width = _width(model, found)
    try:
        with ExitStack() as stack, torch.no_grad():
            _fill(model, blocks)
            for name, module in [("", block), *_leaves(block)]:

                def watch(
                    module: Any, args: Any, kwargs: Any, output: Any, name: str = name
                ) -> None:
                    read, written = _first([*args, *kwargs.values()]), _first(output)
                    if read is not None and written is not None:
                        kept.extend((read, written))
                        seen.setdefault(name, (_storage(read), _storage(written)))

                handle = module.register_forward_hook(watch, with_kwargs=True)
                stack.callback(handle.remove)
            for name, forward in _stand_ins(model, blocks, found, width):
                stack.enter_context(standing_in(model.get_submodule(name), forward))
            trunk = model.get_submodule(found["embedding"].rpartition(".")[0])
            trunk(input_ids=torch.zeros((1, _TOKENS), dtype=torch.long), use_cache=False)
    except Exception as error:
        unclear.append(
            f"the first block could not be run ({type(error).__name__}: {str(error)[:120]}), so "
            "norms are identified by name only"
        )
        return {}
    return seen


def _fill(model: Any, blocks: str) -> None:
    """Set random weights in the first block and in small modules outside of the blocks."""
    within, first = blocks.removesuffix("{}"), f"{blocks.format(0)}."
    keys = [
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if name.startswith(first) or (not name.startswith(within) and p.ndim == 1)
    ]
    RandomWeights(model).fill(model, keys)


def _stand_ins(
    model: Any, blocks: str, found: dict[str, Any], width: int
) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, _TOKENS, width, generator=generator)
    yield found["embedding"], lambda *args, **kwargs: states
    if "positions" in found:
        yield found["positions"], lambda *args, **kwargs: torch.zeros_like(states)
    count = len(model.get_submodule(blocks.removesuffix(".{}")))
    for index in range(1, count):
        yield blocks.format(index), lambda hidden_states, *args, **kwargs: hidden_states


def _first(values: Any) -> torch.Tensor | None:
    if isinstance(values, torch.Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, Iterable):
        return next((found for each in values if (found := _first(each)) is not None), None)
    return None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _norms(
    seen: dict[str, tuple[int, int]],
    found: dict[str, Any],
    norms: dict[str, Any],
    unclear: list[str],
) -> dict[str, Any]:
    """Return the norms before and after attention and MLP."""
    result: dict[str, Any] = {}
    for field, after, reader, writer in (
        ("attention_norm", "attention_post_norm", "query", "attention_output"),
        ("mlp_norm", "mlp_post_norm", "up", "down"),
    ):
        layers = found.get(reader, _ABSENT), found.get(writer, _ABSENT)
        reads, writes = (seen.get(layer) for layer in layers)
        if reads is None or writes is None:
            unclear.append(f"{field} and {after} were not found; norms are {', '.join(norms)}")
            continue
        before = [n for n in norms if n in seen and seen[n][1] == reads[0]]
        behind = [n for n in norms if n in seen and seen[n][0] == writes[1]]
        result[field] = before[0] if before else None
        if behind:
            result[after] = behind[0]
    return result


def _with_norm(model: Any, made: Architecture, unclear: list[str]) -> Architecture:
    """Return the description with the kind of norm found by evaluating the final norm."""
    try:
        norm = model.get_submodule(made.final_norm)
        width = _width(model, {"embedding": made.embedding})
    except AttributeError:
        return made
    for kind in NORMS:
        try:
            other = replace(made, norm=kind)
        except ArchitectureError:
            continue
        has_weight = getattr(norm, "weight", None) is not None
        if has_weight == other.has_gains and norm_behaves(norm, other, width):
            return other
    unclear.append(f"norm was not found: {made.final_norm} computes none of {', '.join(NORMS)}")
    return made

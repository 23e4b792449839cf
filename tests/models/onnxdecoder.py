"""A decoder as an ONNX graph whose linear layers are MatMulNBits nodes, run by onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from corequant.storage.matmulnbits import matmul_nbits

CONTRIB = "com.microsoft"
LONGEST = 64
"""Positions that rotary angles are computed for."""


class Decoder:
    """A Llama without biases; attention, norms and head are onnxruntime's, in float32.

    Parameters
    ----------
    model : transformers.LlamaForCausalLM
        Gives everything that isn't quantized.
    quantized : dict of str to QuantizedTensor
        All linear layers of its blocks.
    """

    def __init__(self, model: Any, quantized: dict[str, Any]) -> None:
        self.model, self.config, self.quantized = model, model.config, quantized
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []
        frequencies = model.model.rotary_emb.inv_freq.numpy()
        angles = np.arange(LONGEST, dtype=np.float32)[:, None] * frequencies
        self._constant("cos", np.cos(angles))
        self._constant("sin", np.sin(angles))
        graph = helper.make_graph(
            self._built(), "decoder", self._inputs(), self._outputs(), self._initializers
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            made.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits (positions, vocabulary) of a sequence without a past."""
        found: np.ndarray = self._run(ids, self._no_past())["logits"][0]
        return found

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Return the likeliest tokens after a sequence, each from the last one and the past."""
        past, given, found = self._no_past(), ids, []
        for _ in range(count):
            given_back = self._run(given, past)
            given = [int(given_back.pop("logits")[0, -1].argmax())]
            past = {name.replace("present", "past"): t for name, t in given_back.items()}
            found += given
        return found

    # ---- what goes in and out

    @property
    def _heads(self) -> tuple[int, int, int]:
        c = self.config
        return c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def _pasts(self, what: str) -> list[str]:
        return [f"{what}.{i}.{k}" for i in range(self.config.num_hidden_layers) for k in "kv"]

    def _no_past(self) -> dict[str, np.ndarray]:
        _, heads, width = self._heads
        empty = np.empty((1, heads, 0, width), np.float32)
        return dict.fromkeys(self._pasts("past"), empty)

    def _run(self, ids: list[int], past: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        total = len(ids) + next(iter(past.values())).shape[2]
        feed = {
            "ids": np.asarray([ids]),
            "last": np.asarray([total - 1], np.int32),
            "total": np.asarray([total], np.int32),
            **past,
        }
        names = ["logits", *self._pasts("present")]
        return dict(zip(names, self.session.run(names, feed), strict=True))

    def _inputs(self) -> list[Any]:
        _, heads, width = self._heads
        value = helper.make_tensor_value_info
        given = [value("ids", TensorProto.INT64, [1, "new"])]
        given += [value(name, TensorProto.INT32, [1]) for name in ("last", "total")]
        shape = [1, heads, "past", width]
        return given + [value(name, TensorProto.FLOAT, shape) for name in self._pasts("past")]

    def _outputs(self) -> list[Any]:
        _, heads, width = self._heads
        value = helper.make_tensor_value_info
        shape = [1, heads, "total", width]
        made = [value(name, TensorProto.FLOAT, shape) for name in self._pasts("present")]
        return [value("logits", TensorProto.FLOAT, [1, "new", self.config.vocab_size]), *made]

    # ---- the graph

    def _built(self) -> list[Any]:
        x = self._node("Gather", [self._weight("model.embed_tokens"), "ids"])
        for i in range(self.config.num_hidden_layers):
            x = self._block(f"model.layers.{i}", i, x)
        x = self._norm("model.norm", x)
        head = self._constant("head", np.ascontiguousarray(self._values("lm_head").T))
        self._node("MatMul", [x, head], ["logits"])
        return self._nodes

    def _block(self, path: str, i: int, x: str) -> str:
        read = self._norm(f"{path}.input_layernorm", x)
        heads, few, _ = self._heads
        parts = [self._linear(f"{path}.self_attn.{name}_proj", read) for name in "qkv"]
        attention = self._node(
            "GroupQueryAttention",
            [*parts, f"past.{i}.k", f"past.{i}.v", "last", "total", "cos", "sin"],
            [f"{path}.attention", f"present.{i}.k", f"present.{i}.v"],
            domain=CONTRIB, num_heads=heads, kv_num_heads=few, do_rotary=1,
        )  # fmt: skip
        x = self._node("Add", [x, self._linear(f"{path}.self_attn.o_proj", attention)])
        read = self._norm(f"{path}.post_attention_layernorm", x)
        gate = self._linear(f"{path}.mlp.gate_proj", read)
        gate = self._node("Mul", [gate, self._node("Sigmoid", [gate])])
        inner = self._node("Mul", [gate, self._linear(f"{path}.mlp.up_proj", read)])
        return self._node("Add", [x, self._linear(f"{path}.mlp.down_proj", inner)])

    def _linear(self, path: str, x: str) -> str:
        attributes, initializers = matmul_nbits(self.quantized[path])
        names = [self._constant(f"{path}.{k}", v) for k, v in initializers.items()]
        return self._node(
            "MatMulNBits", [x, *names], domain=CONTRIB, accuracy_level=0, **attributes
        )

    def _norm(self, path: str, x: str) -> str:
        gain, eps = self._weight(path), self.config.rms_norm_eps
        return self._node("SimplifiedLayerNormalization", [x, gain], axis=-1, epsilon=eps)

    def _weight(self, path: str) -> str:
        return self._constant(path, self._values(path))

    def _values(self, path: str) -> np.ndarray:
        values: np.ndarray = self.model.get_submodule(path).weight.detach().float().numpy()
        return values

    def _constant(self, name: str, values: np.ndarray) -> str:
        self._initializers.append(numpy_helper.from_array(values, name))
        return name

    def _node(
        self, kind: str, inputs: list[str], outputs: list[str] | None = None, **options: Any
    ) -> str:
        outputs = outputs or [f"{kind}.{len(self._nodes)}"]
        self._nodes.append(helper.make_node(kind, inputs, outputs, **options))
        return outputs[0]

"""MatMulNBits initialisers, run by onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

import corequant as cq
from corequant.storage.matmulnbits import matmul_nbits


def run(x, attributes, initializers):
    names = ["B", "scales", *(["zero_points"] if "zero_points" in initializers else [])]
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *names], ["y"], domain="com.microsoft", accuracy_level=0, **attributes
    )
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, x.shape)],
        [onnx.helper.make_tensor_value_info("y", 1, [len(x), attributes["N"]])],
        [onnx.numpy_helper.from_array(initializers[name], name) for name in names],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rest", ["symmetric", "asymmetric", "symmetric:mse"])
@pytest.mark.parametrize("size", [32, 64])
def test_initializers_compute_the_product(bits, rest, size):
    generator = np.random.default_rng(bits)
    W = generator.standard_normal((48, 192)).astype(np.float32)
    x = generator.standard_normal((5, 192)).astype(np.float32)
    quantized = cq.quantize(W, f"int{bits}:group{size}:{rest}")
    y = run(x, *matmul_nbits(quantized))
    exact = x.astype(np.float64) @ cq.dequantize(quantized).astype(np.float64).T
    assert np.abs(y - exact).max() <= 1e-6 * np.abs(exact).max()


def test_an_odd_number_of_groups_pads_zero_points():
    W = np.random.default_rng(1).standard_normal((16, 96)).astype(np.float32)
    quantized = cq.quantize(W, "uint4:group32:asymmetric")
    attributes, initializers = matmul_nbits(quantized)
    assert initializers["zero_points"].shape == (16 * 2,)
    x = np.eye(96, dtype=np.float32)
    np.testing.assert_allclose(
        run(x, attributes, initializers), cq.dequantize(quantized).T, rtol=1e-6, atol=1e-7
    )


def test_what_the_operator_lacks_is_refused():
    W = np.ones((4, 96), np.float32)
    for text in ("int3:group32", "int4:channel", "int4:group48", "mxfp4", "int8f6:group32"):
        with pytest.raises(cq.SpecError, match="MatMulNBits reads"):
            matmul_nbits(cq.quantize(W, text))

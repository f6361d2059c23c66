"""BVLC's GoogLeNet against ONNX Runtime, on the graph that the package `onnx` carries.

That graph is the ONNX model zoo's without its weights; random ones take their place. It
pools with floor where Caffe pools with ceil: at 222 x 222 the two agree.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from abe_jax import pretrained

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.peers

GRAPH = "backend/test/data/light/light_inception_v1.onnx"
SIZE = 222
POOLED = "r138"  # the average pooling's output

# Our part, with the tensors that enter and leave it in the graph.
BLOCKS = {
    "spatial.conv1": ("data_0", "r1"),
    "spatial.conv2_reduce": ("r3", "r5"),
    "spatial.conv2": ("r5", "r7"),
    "spatial.inception_3a": ("r9", "r23"),
    "spatial.inception_3b": ("r23", "r37"),
    "global_features.inception_4a": ("r38", "r52"),
    "global_features.inception_4b": ("r52", "r66"),
    "global_features.inception_4c": ("r66", "r80"),
    "global_features.inception_4d": ("r80", "r94"),
    "global_features.inception_4e": ("r94", "r108"),
    "global_features.inception_5a": ("r109", "r123"),
    "global_features.inception_5b": ("r123", "r137"),
    "spatial": ("data_0", "r38"),
    "global_features": ("r38", POOLED),
}


@pytest.fixture(scope="module")
def zoo_file(tmp_path_factory):
    """The graph with random weights as initialisers, as the zoo's file has them."""
    model = onnx.load(Path(onnx.__file__).parent / GRAPH)
    graph = model.graph
    shapes = {
        tensor.name.removesuffix("__SHAPE"): onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.name.endswith("__SHAPE")
    }
    kept = {}
    for tensor in graph.initializer:
        if tensor.name.startswith("OC2_DUMMY"):
            kept[tensor.name] = tensor
        elif not tensor.name.endswith("__SHAPE"):
            shapes[tensor.name] = np.asarray(tensor.dims)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
        values = scale * rng.standard_normal(tuple(shape)).astype(np.float32)
        values = values.astype(np.float32)
        kept[name] = onnx.numpy_helper.from_array(values, name)
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept.values())
    inputs = [entry for entry in graph.input if not entry.name.endswith("__SHAPE")]
    del graph.input[:]
    graph.input.extend(inputs)
    path = tmp_path_factory.mktemp("zoo") / "googlenet.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    return rng.uniform(-120, 150, (2, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(zoo_file, images):
    """What ONNX Runtime computes at every cut of `BLOCKS`, as `[B, H, W, C]`."""
    model = onnx.load(zoo_file)
    names = sorted({name for cut in BLOCKS.values() for name in cut} - {"data_0"})
    # The classifier's reshape knows one size of image only: cut it off.
    last = next(i for i, n in enumerate(model.graph.node) if POOLED in n.output)
    del model.graph.node[last + 1 :]
    used = {name for node in model.graph.node for name in node.input}
    for entries in (model.graph.initializer, model.graph.input):
        kept = [entry for entry in entries if entry.name in used]
        del entries[:]
        entries.extend(kept)
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
    )
    for entry in model.graph.input:
        if entry.name == "data_0":
            for axis, size in enumerate((len(images), 3, SIZE, SIZE)):
                entry.type.tensor_type.shape.dim[axis].dim_value = size
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = session.run(names, {"data_0": images.transpose(0, 3, 1, 2)})
    maps = {n: v.transpose(0, 2, 3, 1) for n, v in zip(names, values, strict=True)}
    return maps | {"data_0": images, POOLED: maps[POOLED][:, 0, 0]}


def test_blocks_and_pooled_features_agree(zoo_file, images, expected):
    trunk = pretrained.load_googlenet(str(zoo_file))
    assert trunk.variant == "googlenet"

    @nnx.jit
    def run(trunk, maps):
        parts = {}
        for name, (source, _) in BLOCKS.items():
            part = trunk
            for attribute in name.split("."):
                part = getattr(part, attribute)
            parts[name] = part(maps[source])
        return parts, trunk.global_features(trunk.spatial(maps["data_0"]))

    sources = {source for source, _ in BLOCKS.values()}
    parts, features = run(trunk, {k: jax.numpy.asarray(expected[k]) for k in sources})
    for name, (_, target) in BLOCKS.items():
        assert_close(parts[name], expected[target], name)
    assert features.shape == (2, 1024)
    assert_close(features, expected[POOLED], "whole trunk")


def assert_close(actual, expected, name):
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    print(f"{name}: {error:.1e}")
    assert error <= 1e-4, f"{name}: {error}"

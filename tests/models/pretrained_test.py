"""The tables of names, and errors that need no package to read a file."""

import dataclasses
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from flax import nnx, traverse_util
from models.conftest import one_head

from abe_jax import models, pretrained
from abe_jax.errors import UserError
from abe_jax.models import googlenet, weight_files
from abe_jax.models import weights as weights_module
from abe_jax.models.shapes import without_values

OIHW = (3, 2, 0, 1)


def _names(form):
    """Every tensor name of a published file, classifiers left out."""
    blocks = ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    if form is googlenet.BVLC:
        branches = ["1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj"]
        layers = ["conv1/7x7_s2", "conv2/3x3_reduce", "conv2/3x3"]
        layers += [f"inception_{b}/{branch}" for b in blocks for branch in branches]
        return [f"{layer}_{leaf}_0" for layer in layers for leaf in "wb"]
    branches = ["1", "2.0", "2.1", "3.0", "3.1", "4.1"]
    layers = ["conv1", "conv2", "conv3"]
    layers += [f"inception{b}.branch{branch}" for b in blocks for branch in branches]
    leaves = ["conv.weight"]
    leaves += [
        f"bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")
    ]
    return [f"{layer}.{leaf}" for layer in layers for leaf in leaves]


def _shapes(form):
    model = without_values(lambda rngs: form.section(form.stages, rngs=rngs))
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.fixture(params=[googlenet.BVLC, googlenet.TORCHVISION], ids=lambda f: f.name)
def form(request):
    return request.param


@pytest.fixture
def naming(form):
    (naming,) = form.namings
    return naming


@pytest.fixture
def weights(form, naming):
    """Random weights of the right shapes, by the names of a file."""
    rng = np.random.default_rng(0)
    shapes = _shapes(form)
    result = {}
    for name in _names(form):
        shape = shapes[naming.path(name)]
        if len(shape) == 4:
            shape = tuple(shape[axis] for axis in OIHW)
        result[name] = rng.uniform(0.1, 1, shape).astype(np.float32)
    return result


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads weights as if read from a file: the readers have tests of their own."""

    def load(weights):
        def read(file):
            return {
                name: weight_files.Tensor(str(v.dtype), v.shape, lambda v=v: v)
                for name, v in weights.items()
            }

        monkeypatch.setitem(weight_files._READERS, ".onnx", read)
        path = tmp_path / "weights.onnx"
        path.touch()
        return pretrained.load_googlenet(str(path))

    return load


def test_names_and_paths_are_one_to_one(form, naming):
    paths = [naming.path(name) for name in _names(form)]
    assert len(set(paths)) == len(paths)
    assert set(paths) == set(_shapes(form))


def test_weights_arrive_in_their_layout(form, naming, weights, load):
    trunk = load(weights)
    assert trunk.variant == form.name
    norms = [m for _, m in nnx.iter_modules(trunk) if isinstance(m, nnx.BatchNorm)]
    assert bool(norms) == (form is googlenet.TORCHVISION)
    assert all(norm.use_running_average for norm in norms)  # as in use
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(trunk)))
    flat = {path[1:]: value for path, value in flat.items()}
    for name, value in weights.items():
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(flat[naming.path(name)], value)
    params = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(trunk, nnx.Param)))
    params = {path[1:] for path in params}
    assert {path[-1] for path in flat.keys() - params} <= {"mean", "var"}


def test_classifiers_are_left_out_and_named(form, weights, load, caplog):
    caplog.set_level("INFO", logger="abe_jax")  # absl's is silenced by the program
    extra = {
        "googlenet": ["loss3/classifier_w_0", "loss1/fc_b_0", "OC2_DUMMY_1"],
        "googlenet_bn": ["fc.weight", "aux1.fc2.bias", "conv1.bn.num_batches_tracked"],
    }[form.name]
    load(weights | {name: np.zeros(3, np.int64) for name in extra})
    assert (
        "1000-way classifier (1 tensors), auxiliary classifiers (1 ten" in caplog.text
    )


def test_everything_wrong_is_listed(naming, weights, load):
    names = list(weights)
    missing, shaped, half, *_ = names
    del weights[missing]
    weights[shaped] = np.zeros((2, 3), np.float32)
    weights[half] = weights[half].astype(np.float16)
    weights[f"{names[-1]}_ema"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        load(weights)
    message = str(error.value)
    assert "\n" not in message
    assert f"missing (1): {'.'.join(naming.path(missing))}" in message
    assert f"wrong shape (1): {shaped} (2, 3), not (" in message
    assert f"not float32 (1): {half} float16" in message
    assert f"unknown (1): {names[-1]}_ema" in message


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite(naming, weights, load, value):
    name = list(weights)[7]
    weights[name].flat[-1] = value
    with pytest.raises(UserError, match=r"not finite.*\(1\): [a-z0-9_]+\."):
        load(weights)


@pytest.mark.parametrize("form", [googlenet.TORCHVISION], indirect=True)
def test_a_variance_below_zero(weights, load):
    weights["conv1.bn.running_var"][3] = -1e-3
    with pytest.raises(UserError, match=r"negative variance \(1\): conv1"):
        load(weights)


def test_another_network(load):
    weights = {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}
    with pytest.raises(UserError, match="no known network.*'features.0.weight'"):
        load(weights)
    with pytest.raises(UserError, match="none of its 0 tensors is named"):
        load({})


@pytest.mark.parametrize("form", [googlenet.TORCHVISION], indirect=True)
@pytest.mark.parametrize(
    "name",
    [
        "abe",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("m_heads", "one_head")),
    ],
)
def test_initialize(name, form, weights, load, caplog, monkeypatch):
    caplog.set_level("INFO", logger="abe_jax")  # absl's is silenced by the program
    trunk = load(weights)
    source = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(trunk)))
    source = {path[1:]: value for path, value in source.items()}
    monkeypatch.setattr(weights_module, "read", lambda *_: (form, source))
    sizes = {"embedding_dim": 8, "trunk": form.name, "rngs": nnx.Rngs(0)}
    if name != "one_head":
        sizes["num_learners"] = 2
    make = {"abe": models.ABE, "m_heads": models.MHeads, "one_head": models.OneHead}
    model = make[name](**sizes)
    before = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    pretrained.initialize(model, "file")
    after = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    assert after.keys() == before.keys()
    for path, value in after.items():
        if models.is_new_layer(path):
            assert value is before[path]
        else:
            wanted = source[weights_module.layer_of(path)]
            for copy in value if path[0] == "heads" else [value]:
                np.testing.assert_array_equal(copy, wanted)
    pointers = {value.unsafe_buffer_pointer() for value in after.values()}
    assert len(pointers) == len(after)  # a step could not be given one buffer twice
    params = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    new = sum(v.size for path, v in params.items() if models.is_new_layer(path))
    old = sum(v.size for v in params.values()) - new
    assert f"{old} parameters start from file, {new} are new." in caplog.text


def test_the_other_variant(monkeypatch):
    monkeypatch.setattr(weights_module, "read", lambda *_: (googlenet.TORCHVISION, {}))
    with pytest.raises(UserError, match="--config.model.trunk=googlenet_bn"):
        pretrained.initialize(one_head("googlenet"), "file")


@pytest.mark.parametrize("form", [googlenet.TORCHVISION], indirect=True)
def test_another_width(form, weights, load, monkeypatch):
    source = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(load(weights))))
    source = {path[1:]: value for path, value in source.items()}
    monkeypatch.setattr(weights_module, "read", lambda *_: (form, source))
    model = one_head(dataclasses.replace(form, width=0.5))
    with pytest.raises(UserError, match="another width than 1: .* not "):
        pretrained.initialize(model, "file")


def test_files_that_are_not_there_or_not_read(tmp_path, monkeypatch):
    def fails(name, message):
        with pytest.raises(UserError, match=message):
            pretrained.load_googlenet(str(tmp_path / name))

    fails("none.onnx", "there is no such file")
    for path in (tmp_path / "none.onnx", "~nosuchuser/none.onnx"):
        with pytest.raises(UserError, match="/none.onnx: there is no such file"):
            pretrained.load_googlenet(path)
    (tmp_path / "folder.pth").mkdir()
    fails("folder.pth", "there is no such file")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty.safetensors").touch()
    broken = "is broken" if find_spec("safetensors") else "reading it needs a package"
    with pytest.raises(UserError, match=f"~/empty.safetensors:? {broken}"):
        pretrained.load_googlenet("~/empty.safetensors")
    (tmp_path / "weights.h5").touch()
    fails("weights.h5", r"read from \.onnx, \.safetensors, \.pth, \.pt files")
    with (tmp_path / "big.pth").open("wb") as file:
        file.truncate(2**30 + 1)
    fails("big.pth", "1073741825 bytes; no trunk has more")
    fails(f"{'w' * 300}.onnx", "cannot be read: File name too long")
    for suffix, package in ((".onnx", "onnx"), (".pth", "torch"), (".pt", "torch")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / f"w{suffix}").touch()
        fails(f"w{suffix}", f"not installed: pip install {package}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "w.safetensors").touch()
    fails("w.safetensors", "not installed: pip install safetensors")

"""Broken, foreign and hostile files of pretrained weights: one clear line for each."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from flax import nnx, traverse_util

from abe_jax import pretrained
from abe_jax.errors import UserError
from abe_jax.models import googlenet
from abe_jax.models.shapes import without_values

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

pytestmark = pytest.mark.peers

LAYOUT = (3, 2, 0, 1)


class Hostile:
    """Runs a command as soon as it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture(scope="module")
def weights():
    """All tensors of a torchvision GoogLeNet, by their names."""
    form = googlenet.TORCHVISION
    model = without_values(lambda rngs: form.section(form.stages, rngs=rngs))
    shapes = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    names = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    layers = ["conv1", "conv2", "conv3"]
    for block in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        for branch in ("1", "2.0", "2.1", "3.0", "3.1", "4.1"):
            layers.append(f"inception{block}.branch{branch}")
    result = {}
    for name in (f"{layer}.{leaf}" for layer in layers for leaf in names):
        shape = shapes[form.namings[0].path(name)].shape
        if len(shape) == 4:
            shape = tuple(shape[axis] for axis in LAYOUT)
        result[name] = np.full(shape, 0.5, np.float32)
    return result


def _save_onnx(weights, path):
    tensors = [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = onnx.helper.make_graph([], "weights", [], [], initializer=tensors)
    onnx.save(onnx.helper.make_model(graph), path)


def _save_torch(weights, path):
    torch.save({k: torch.from_numpy(v.copy()) for k, v in weights.items()}, path)


def _save_old_torch(weights, path):
    tensors = {k: torch.from_numpy(v.copy()) for k, v in weights.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


SAVERS = {
    "a.onnx": _save_onnx,
    "a.safetensors": lambda weights, path: safetensors_numpy.save_file(weights, path),
    "a.pth": _save_torch,
    "old.pth": _save_old_torch,
}


@pytest.fixture(params=SAVERS)
def save(request, tmp_path):
    def save(weights):
        path = tmp_path / request.param
        SAVERS[request.param](weights, path)
        return path

    return save


def _refused(path, message=None):
    with pytest.raises(UserError, match=message) as error:
        pretrained.load_googlenet(str(path))
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text
    assert len(text) < len(str(path)) + 400, len(text)
    return text


def test_a_good_file(save, weights):
    assert pretrained.load_googlenet(str(save(weights))).variant == "googlenet_bn"


def test_truncated(save, weights):
    path = save(weights)
    content = path.read_bytes()
    for kept in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        _refused(path)


def test_damaged_beginning(save, weights):
    path = save(weights)
    content = path.read_bytes()
    path.write_bytes(b"\xff" * 64 + content[64:])
    _refused(path)


def test_another_network(save):
    _refused(
        save({"features.0.weight": np.ones((8, 3, 3, 3), np.float32)}),
        "no known network",
    )


def test_half_precision(save, weights):
    halves = {k: v.astype(np.float16) for k, v in weights.items()}
    _refused(save(halves), r"not float32 \(285\): conv1\S+ float16, .*, \.\.\.")


def test_bfloat16(weights, tmp_path):
    tensors = {k: torch.from_numpy(v.copy()).bfloat16() for k, v in weights.items()}
    torch.save(tensors, tmp_path / "a.pt")
    _refused(tmp_path / "a.pt", "bfloat16")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    safetensors_torch.save_file(tensors, tmp_path / "a.safetensors")
    _refused(tmp_path / "a.safetensors", "bfloat16")


def test_nan(save, weights):
    damaged = dict(weights)
    damaged["conv3.bn.bias"] = np.full(192, np.nan, np.float32)
    _refused(save(damaged), r"not finite.*\(1\): conv2.norm.bias")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".onnx", ".safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_code_is_not_run(suffix, form, weights, tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / f"weights{suffix}"
    tensors = {k: torch.from_numpy(v.copy()) for k, v in weights.items()}
    content = tensors | {"extra": Hostile(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    _refused(path)
    assert not marker.exists()
    # The file is a real danger: plain unpickling does run its command.
    if form == "pickle":
        pickle.loads(path.read_bytes())
        assert marker.exists()


def test_zip_bomb(weights, tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb/data.pkl", "w", force_zip64=True) as record:
            for _ in range(200):
                record.write(b"\0" * 2**20)
    assert path.stat().st_size < 2**20
    _refused(path, "zip bomb")


def test_zip_bomb_of_overlapping_records(tmp_path):
    """Stored records, each of which claims the same bytes again."""
    path = tmp_path / "overlap.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\0" * 2**20)
        entry = archive.infolist()[0]
        for i in range(50):
            other = zipfile.ZipInfo(f"a/data/{i}")
            other.header_offset, other.CRC = entry.header_offset, entry.CRC
            other.compress_size = other.file_size = entry.file_size
            archive.filelist.append(other)
        archive._didModify = True
    _refused(path, "zip bomb")


def test_not_a_state_dict(tmp_path):
    path = tmp_path / "a.pth"
    torch.save([torch.zeros(3)], path)
    _refused(path, "holds no state dict")
    torch.save({"state_dict": {"conv1.conv.weight": torch.zeros(3)}}, path)
    _refused(path, "holds no state dict")


def test_tensors_that_claim_more_than_the_file_has(weights, tmp_path):
    path = tmp_path / "a.pth"
    tensors = {k: torch.from_numpy(v.copy()) for k, v in weights.items()}
    tensors["conv1.conv.weight"] = torch.zeros(1).expand(2**40)
    torch.save(tensors, path)
    _refused(path, r"conv1.conv.weight \(1099511627776,\), not \(64, 3, 7, 7\)")

    path = tmp_path / "a.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    _refused(path)
    path.write_bytes(struct.pack("<Q", 2**62) + header)
    _refused(path)


def test_onnx_that_points_to_another_file(weights, tmp_path):
    (tmp_path / "secret").write_bytes(b"\0" * (64 * 3 * 7 * 7 * 4))
    path = tmp_path / "a.onnx"
    _save_onnx(weights, path)
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    path.write_bytes(model.SerializeToString())
    _refused(path, "in another file")


def test_onnx_with_too_few_values(weights, tmp_path):
    path = tmp_path / "a.onnx"
    _save_onnx(weights, path)
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = b"\0" * 8
    path.write_bytes(model.SerializeToString())
    _refused(path, "is broken: conv1.conv.weight")

"""The trunk `googlenet_bn` against torchvision's own `googlenet`."""

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from abe_jax import pretrained
from abe_jax.models import googlenet
from abe_jax.models.googlenet_weights import TORCHVISION

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.peers

BLOCKS = {
    "conv1": "spatial.conv1",
    "conv2": "spatial.conv2_reduce",
    "conv3": "spatial.conv2",
    "inception3a": "spatial.inception_3a",
    "inception3b": "spatial.inception_3b",
    **{f"inception4{c}": f"global_features.inception_4{c}" for c in "abcde"},
    "inception5a": "global_features.inception_5a",
    "inception5b": "global_features.inception_5b",
}


@pytest.fixture(scope="module")
def net(torchvision):
    """torchvision's network with random weights and random running averages."""
    torch.manual_seed(0)
    net = torchvision.models.googlenet(aux_logits=True, init_weights=False)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def files(net, tmp_path_factory):
    """The weights as torch and safetensors write them."""
    folder, weights = tmp_path_factory.mktemp("weights"), net.state_dict()
    torch.save(weights, folder / "new.pth")
    # What torchvision's published file of 2019 is.
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    safetensors_torch.save_file(weights, folder / "plain.safetensors")
    return [str(folder / n) for n in ("new.pth", "old.pth", "plain.safetensors")]


def _variables(trunk):
    return traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(trunk)))


def _close(actual, expected, name, tolerance=1e-4):
    expected = expected.detach().numpy()
    if expected.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1)
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    print(f"{name}: {error:.1e}")
    assert error <= tolerance, f"{name}: {error}"


def _channels_last(tensor):
    return jax.numpy.asarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


def test_all_files_give_the_same_trunk(files):
    first, *others = (pretrained.load_googlenet(file) for file in files)
    assert first.variant == "googlenet_bn"
    for other in others:
        jax.tree.map(
            np.testing.assert_array_equal, _variables(first), _variables(other)
        )


def test_preprocessing_is_torchvisions(net):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    mean, std = np.asarray([0.485, 0.456, 0.406]), np.asarray([0.229, 0.224, 0.225])
    scaled = torch.as_tensor((images / 255 - mean) / std).permute(0, 3, 1, 2)
    net.transform_input = True  # as torchvision sets it for its published weights
    expected = net._transform_input(scaled)
    ours = googlenet.TORCHVISION.preprocessing(jax.numpy.asarray(images))
    _close(ours, expected, "preprocessing", 1e-6)


def test_inference_agrees(net, files):
    trunk = pretrained.load_googlenet(files[0])
    cuts = {}
    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: cuts.update({name: (*inputs, output)})
        )
        for name in (*BLOCKS, "avgpool")
    ]
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        net.eval()._forward(images)
    for hook in hooks:
        hook.remove()

    @nnx.jit
    def run(trunk, images, sources):
        parts = {}
        for name, path in BLOCKS.items():
            part = trunk
            for attribute in path.split("."):
                part = getattr(part, attribute)
            parts[name] = part(sources[name])
        return parts, trunk.global_features(trunk.spatial(images))

    sources = {name: _channels_last(cuts[name][0]) for name in BLOCKS}
    parts, features = run(trunk, _channels_last(images), sources)
    for name in BLOCKS:
        _close(parts[name], cuts[name][1], name)
    _close(features, cuts["avgpool"][1][:, :, 0, 0], "whole trunk")


def test_a_training_step_agrees(net, files):
    """Features from batch statistics of two devices, and averages after one step."""
    trunk = nnx.view(pretrained.load_googlenet(files[0]), use_running_average=False)
    graphdef, state = nnx.split(trunk)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])

    def step(state, images):
        trunk = nnx.merge(graphdef, state, copy=True)
        features = trunk.global_features(trunk.spatial(images))
        return features, nnx.to_pure_dict(nnx.state(trunk))

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P()),
        check_vma=False,
    )
    torch.manual_seed(1)
    images = torch.randn(8, 3, 96, 96)
    features, after = jax.jit(mapped)(state, _channels_last(images))

    net.load_state_dict(torch.load(files[0], weights_only=True))
    pooled = []
    hook = net.avgpool.register_forward_hook(lambda _, i, out: pooled.append(out))
    with torch.no_grad():
        net.train()._forward(images)
    hook.remove()
    _close(features, pooled[0][:, :, 0, 0], "features", 2e-4)

    after = traverse_util.flatten_dict(after)
    names = [n for n in net.state_dict() if "running" in n and "aux" not in n]
    assert len(names) == 2 * 57
    for name in names:
        (path,) = (p for p in after if p[1:] == TORCHVISION.path(name))
        _close(after[path], net.get_buffer(name), name)

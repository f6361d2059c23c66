"""BVLC's trunk and ABE-8 against the same networks written here in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from abe_jax import losses, models, pretrained
from abe_jax.models import googlenet_weights

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.peers

# Channels as in table 1 of the paper on GoogLeNet.
INCEPTION = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}
STEM = {"conv1/7x7_s2": (3, 64, 7), "conv2/3x3_reduce": (64, 64, 1)}
STEM["conv2/3x3"] = (64, 192, 3)


def _layers(blocks):
    """Name, as Caffe has it, to in and out channels and kernel of each convolution."""
    layers = {}
    for block in blocks:
        source, one, three_reduce, three, five_reduce, five, pool = INCEPTION[block]
        layers |= {
            f"inception_{block}/1x1": (source, one, 1),
            f"inception_{block}/3x3_reduce": (source, three_reduce, 1),
            f"inception_{block}/3x3": (three_reduce, three, 3),
            f"inception_{block}/5x5_reduce": (source, five_reduce, 1),
            f"inception_{block}/5x5": (five_reduce, five, 5),
            f"inception_{block}/pool_proj": (source, pool, 1),
        }
    return layers


class Net:
    """Caffe's layers over a dict of weights, named as in the ONNX zoo's file."""

    def __init__(self, layers):
        self.weights = {}
        for name, (source, out, kernel) in layers.items():
            spread = (2 / (source * kernel * kernel)) ** 0.5
            weight = spread * torch.randn(out, source, kernel, kernel)
            self.weights[f"{name}_w_0"] = weight.requires_grad_()
            self.weights[f"{name}_b_0"] = (0.1 * torch.randn(out)).requires_grad_()

    def convolve(self, name, x, stride=1):
        weight = self.weights[f"{name}_w_0"]
        x = torch.nn.functional.conv2d(
            x, weight, self.weights[f"{name}_b_0"], stride, weight.shape[-1] // 2
        )
        return torch.relu(x)

    def inception(self, block, x):
        def layer(name, x):
            return self.convolve(f"inception_{block}/{name}", x)

        pooled = torch.nn.functional.max_pool2d(x, 3, 1, 1)
        branches = (
            layer("1x1", x),
            layer("3x3", layer("3x3_reduce", x)),
            layer("5x5", layer("5x5_reduce", x)),
            layer("pool_proj", pooled),
        )
        return torch.cat(branches, dim=1)

    def halve(self, x):
        return torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)

    def spatial(self, x):
        x = self.halve(self.convolve("conv1/7x7_s2", x, 2))
        x = torch.nn.functional.local_response_norm(x, 5)
        x = self.convolve("conv2/3x3", self.convolve("conv2/3x3_reduce", x))
        x = self.halve(torch.nn.functional.local_response_norm(x, 5))
        return self.halve(self.inception("3b", self.inception("3a", x)))

    def inception_4(self, x):
        for block in ("4a", "4b", "4c", "4d", "4e"):
            x = self.inception(block, x)
        return x

    def global_features(self, x):
        x = self.halve(self.inception_4(x))
        return self.inception("5b", self.inception("5a", x)).mean(dim=(2, 3))


def _save(net, folder):
    path = folder / "bvlc.safetensors"
    weights = {k: v.detach() for k, v in net.weights.items()}
    safetensors_torch.save_file(weights, path)
    return str(path)


def _channels_last(tensor):
    return jnp.asarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


def _error(actual, expected):
    expected = expected.detach().numpy()
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def test_trunk_agrees_at_224(tmp_path):
    """Ceil pooling and floor pooling differ here: 14 x 14 maps, not 13 x 13."""
    torch.manual_seed(0)
    net = Net(STEM | _layers(INCEPTION))
    trunk = pretrained.load_googlenet(_save(net, tmp_path))
    images = 60 * torch.randn(2, 3, 224, 224)

    @nnx.jit
    def run(trunk, images):
        maps = trunk.spatial(images)
        return maps, trunk.global_features(maps)

    maps, features = run(trunk, _channels_last(images))
    with torch.no_grad():
        expected = net.spatial(images)
        pooled = net.global_features(expected)
    assert maps.shape == (2, 14, 14, 480)
    assert _error(maps, expected.permute(0, 2, 3, 1)) <= 1e-4
    assert _error(features, pooled) <= 1e-4


class ABE(Net):
    """ABE-8^512 in PyTorch, learner by learner as the paper defines it."""

    def __init__(self):
        super().__init__(STEM | _layers(INCEPTION))
        self.common = Net(_layers([b for b in INCEPTION if b.startswith("4")]))
        self.masks = [torch.nn.Conv2d(832, 480, 1) for _ in range(8)]
        self.last = torch.nn.Linear(1024, 64)

    def embed(self, images):
        maps = self.spatial(images)
        common = self.common.inception_4(maps)
        learners = []
        for mask in self.masks:
            features = self.global_features(maps * torch.sigmoid(mask(common)))
            learners.append(torch.nn.functional.normalize(self.last(features)))
        return torch.stack(learners, dim=1)


def _reference_loss(embeddings, labels):
    """The paper's loss by loops over pairs, both margins 1, lambda_div 1."""
    total = 0.0
    count = len(labels)
    for i in range(count):
        for j in range(count):
            for m in range(8):
                distance = (embeddings[i, m] - embeddings[j, m]).square().sum()
                same = labels[i] == labels[j]
                total = total + (distance if same else torch.relu(1 - distance))
        for p in range(8):
            for q in range(p + 1, 8):
                distance = (embeddings[i, p] - embeddings[i, q]).square().sum()
                total = total + torch.relu(1 - distance)
    return total / count


LABELS = np.asarray([0, 0, 1, 1, 2, 2, 3, 4])


def test_pretrained_abe_8_holds_the_file_where_it_belongs(tmp_path):
    torch.manual_seed(0)
    net = ABE()
    model = _create(pretrained=_save(net, tmp_path))
    ours = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    theirs = _parameters(net)
    assert theirs.keys() == ours.keys()
    for path, tensor in theirs.items():
        assert ours[path].shape == tensor.shape
        # The attention starts from the same 4a to 4e, in memory of its own.
        if path[:2] == ("attention_branch", "common"):
            path = ("global_features", *path[2:])
            tensor = theirs[path]
        if not models.is_new_layer(path):
            np.testing.assert_array_equal(ours[path], tensor.detach())
    buffers = {array.unsafe_buffer_pointer() for array in ours.values()}
    assert len(buffers) == len(ours)


@pytest.fixture(scope="module")
def loss_and_gradients():
    """ABE-8's loss of the parameters by path, and its gradient."""
    graphdef, _ = nnx.split(_create())

    @jax.jit
    @jax.value_and_grad
    def loss(params, images):
        embeddings = nnx.merge(graphdef, nnx.State(params), copy=True)(images)
        divergence = losses.divergence_loss(embeddings)
        return losses.contrastive_loss(embeddings, jnp.asarray(LABELS)) + divergence

    return loss


def _compare(loss_and_gradients, net, images):
    """Error of the loss, and of each parameter's gradient, relative to its largest."""
    params = {k: jnp.asarray(v.detach()) for k, v in _parameters(net).items()}
    actual, cotangents = loss_and_gradients(
        traverse_util.unflatten_dict(params), _channels_last(images)
    )
    expected = _reference_loss(net.embed(images), LABELS)
    expected.backward()
    cotangents = traverse_util.flatten_dict(cotangents)
    references = _parameters(net, lambda tensor: tensor.grad)
    assert cotangents.keys() == references.keys()
    errors = [_error(cotangents[k], v) for k, v in references.items()]
    loss_error, worst = float(_error(actual, expected)), float(max(errors))
    print(
        f"loss {loss_error:.1e}, cotangents {worst:.1e}, median {np.median(errors):.1e}"
    )
    return loss_error, worst


def test_abe_8_agrees_in_float32(loss_and_gradients):
    """Loss and every gradient to 1e-3.

    Rounding now and then moves a unit across the kink of its ReLU, or a maximum to
    another position; then gradients jump, nobody's mistake (see the next test).
    So small images, several draws, and one must be free of that.
    """
    worst = []
    for seed in range(25):
        torch.manual_seed(seed)
        images = 60 * torch.randn(8, 3, 40, 40)
        loss_error, error = _compare(loss_and_gradients, ABE(), images)
        assert loss_error <= 1e-3
        worst.append(error)
        if error <= 1e-3:
            return
    raise AssertionError(f"largest error of each draw: {worst}")


def test_abe_8_agrees_in_float64(loss_and_gradients):
    """Every gradient of one draw, at a size where float32 would meet many kinks."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        net, images = ABE(), 60 * torch.randn(8, 3, 64, 64)
        with jax.enable_x64(True):
            loss_error, error = _compare(loss_and_gradients, net, images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss_error <= 1e-13 and error <= 1e-11


def _create(**changes):
    fields = {"name": "abe", "trunk": "googlenet", "width": 1.0}
    sizes = {"num_learners": 8, "embedding_dim": 512}
    return models.create(ConfigDict(fields | sizes | changes), rngs=nnx.Rngs(0))


def _parameters(net, of=lambda tensor: tensor):
    """`of` each of ABE's tensors, by path and in the layout of our model."""
    result = {}
    for part in (net, net.common):
        for name, tensor in part.weights.items():
            path = googlenet_weights.BVLC.path(name)
            in_s = path[0].startswith("conv") or path[0].startswith("inception_3")
            prefix = ("spatial",) if in_s else ("global_features",)
            if part is net.common:
                prefix = ("attention_branch", "common")
            result[(*prefix, *path)] = _layout(of(tensor))
    kernels = torch.cat([of(mask.weight) for mask in net.masks])
    result[("attention_branch", "last", "kernel")] = _layout(kernels)
    biases = torch.cat([of(mask.bias) for mask in net.masks])
    result[("attention_branch", "last", "bias")] = biases
    result[("head", "kernel")] = of(net.last.weight).T
    result[("head", "bias")] = of(net.last.bias)
    return result


def _layout(tensor):
    return tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor

"""ResNet-50 and the vision transformers against torchvision's and timm's modules.

Both get the same random weights, through a file as users have it. ABE is built from the
peer's modules as `abe_jax.models.abe` defines it, one learner at a time.
"""

import copy
import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from abe_jax import losses, models, pretrained
from abe_jax.models.trunks import TRUNKS

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.peers

LEARNERS = 2
LABELS = np.asarray([0, 0, 1, 2])
# timm's names of the forms that are called otherwise there.
TAGS = {"resnet50": "resnet50.tv_in1k"}
for size in ("small", "base"):
    TAGS[f"vit_{size}_patch16"] = f"vit_{size}_patch16_224.augreg_in21k_ft_in1k"
    TAGS[f"vit_{size}_patch16_dino"] = f"vit_{size}_patch16_224.dino"
TIMM = {f"vit_{size}_patch16": f"vit_{size}_patch16_224" for size in ("small", "base")}


@dataclasses.dataclass
class Peer:
    """A network in PyTorch and how ABE cuts it.

    Attributes:
      net: whole, without classifier.
      copied: the blocks that the attention branch copies.
      to_s: prefixes of the names of S's tensors.
      spatial: images to S's output.
      maps: of such an output, `[B, C, h, w]`.
      attend: S's output to the copied blocks' output.
      times: S's output under a mask `[B, C, h, w]`.
      features: S's output to features `[B, C]`.
    """

    net: Any
    copied: Any
    to_s: tuple[str, ...]
    spatial: Callable
    maps: Callable
    attend: Callable
    times: Callable
    features: Callable


def resnet50(net, _) -> Peer:
    net.fc = torch.nn.Identity()
    copied = copy.deepcopy(net.layer4)
    copied[0].conv2.stride = copied[0].downsample[0].stride = (1, 1)

    def spatial(images):
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return net.layer3(net.layer2(net.layer1(x)))

    return Peer(
        net,
        torch.nn.ModuleDict({"layer4": copied}),
        to_s=("conv1", "bn1", "layer1", "layer2", "layer3"),
        spatial=spatial,
        maps=lambda x: x,
        attend=copied,
        times=torch.mul,
        features=lambda x: net.avgpool(net.layer4(x)).flatten(1),
    )


def transformer(net, rows) -> Peer:
    net.head = torch.nn.Identity()
    copied = torch.nn.ModuleDict({str(i): copy.deepcopy(net.blocks[i]) for i in (6, 7)})
    prefix = net.num_prefix_tokens

    def maps(x):
        return x[:, prefix:].unflatten(1, (rows, -1)).permute(0, 3, 1, 2)

    def times(x, mask):
        patches = (maps(x) * mask).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :prefix], patches], dim=1)

    return Peer(
        net,
        torch.nn.ModuleDict({"blocks": copied}),
        to_s=(
            *("cls_token", "reg_token", "pos_embed", "patch_embed"),
            *(f"blocks.{i}." for i in range(6)),
        ),
        spatial=lambda x: net.blocks[:6](net._pos_embed(net.patch_embed(x))),
        maps=maps,
        attend=lambda x: copied["7"](copied["6"](x)),
        times=times,
        features=lambda x: net.forward_head(net.norm(net.blocks[6:](x))),
    )


def _shaken(net):
    """Weights away from the values at which networks start: zeros, ones, 1e-5."""
    for name, tensor in net.state_dict().items():
        if "running_var" in name or "gamma" in name:
            torch.nn.init.uniform_(tensor, 0.3, 1.2)
        elif tensor.ndim == 1:
            tensor += 0.2 * torch.randn_like(tensor)
        elif tensor.ndim == 3:  # tokens and positions
            torch.nn.init.normal_(tensor, std=0.3)
    return net


def _net(name, request, **options):
    torch.manual_seed(0)
    if name == "resnet50":
        torchvision = request.getfixturevalue("torchvision")
        return _shaken(torchvision.models.resnet50())
    timm = request.getfixturevalue("timm")
    # The grid of the published weights, and images of any size.
    name = TIMM.get(name, name)
    return _shaken(timm.create_model(name, dynamic_img_size=True, num_classes=7))


def _saved(net, folder):
    path = str(folder / "model.safetensors")
    safetensors_torch.save_file(net.state_dict(), path)
    return path


def _channels_last(tensor):
    return jnp.asarray(tensor.detach().numpy().transpose(0, 2, 3, 1))


def _error(actual, expected):
    expected = np.asarray(expected.detach())
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [
        ("resnet50", 96, 75),
        ("vit_small_patch16", 224, 224),
        ("vit_small_patch16", 64, 96),
        ("vit_small_patch14_dinov2", 98, 98),
        ("vit_base_patch14_reg4_dinov2", 56, 70),
    ],
)
def test_features_agree(name, height, width, request, tmp_path):
    """In inference, also where position embeddings are interpolated."""
    net = _net(name, request)
    model = models.OneHead(embedding_dim=8, trunk=name, rngs=nnx.Rngs(0))
    pretrained.initialize(model, _saved(net, tmp_path))
    images = torch.randn(2, 3, height, width)
    setattr(net, "fc" if name == "resnet50" else "head", torch.nn.Identity())
    with torch.no_grad():
        expected = net.eval()(images)
    features = nnx.jit(lambda m, x: m.global_features(m.spatial(x)))(
        model, _channels_last(images)
    )
    assert features.shape == expected.shape
    assert _error(features, expected) <= 1e-4


def test_preprocessing_is_that_of_the_peers(request):
    timm = request.getfixturevalue("timm")
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    for name, trunk in TRUNKS.items():
        if name.startswith("googlenet"):
            continue
        known = timm.get_pretrained_cfg(TAGS.get(name, name)).to_dict()
        expected = (images / 255 - np.asarray(known["mean"])) / np.asarray(known["std"])
        found = trunk.preprocessing(jnp.asarray(images))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        architectures = trunk.namings[0].architectures
        assert known["architecture"] in architectures
        assert all(map(timm.is_model, architectures))


class ABE:
    """ABE from a peer's modules, all learners' maps in one batch."""

    def __init__(self, peer: Peer, channels: int, features: int):
        self.peer = peer
        self.last = torch.nn.Conv2d(features, channels * LEARNERS, 1)
        self.head = torch.nn.Linear(features, 8)

    def embed(self, images):
        peer, x = self.peer, self.peer.spatial(images)
        masks = torch.sigmoid(self.last(peer.maps(peer.attend(x))))
        seen = [peer.times(x, mask) for mask in masks.chunk(LEARNERS, dim=1)]
        features = peer.features(torch.cat(seen))
        embeddings = torch.nn.functional.normalize(self.head(features))
        return torch.stack(embeddings.chunk(LEARNERS), dim=1)

    def gradients(self, naming):
        """By our path and in our layout."""
        found = {}

        def add(prefix, path, gradient):
            order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(gradient.ndim)
            gradient = gradient if order is None else gradient.permute(order)
            found[(*prefix, *path)] = gradient

        common = ("attention_branch", "common")
        for part in (self.peer.net, self.peer.copied):
            for name, tensor in part.named_parameters():
                in_s = name.startswith(self.peer.to_s)
                of_net = ("spatial",) if in_s else ("global_features",)
                prefix = common if part is self.peer.copied else of_net
                add(prefix, naming.path(name), tensor.grad)
        for path, layer in (
            (("attention_branch", "last"), self.last),
            (("head",), self.head),
        ):
            add(path, ("kernel",), layer.weight.grad)
            add(path, ("bias",), layer.bias.grad)
        return found


def _reference_loss(embeddings):
    """The paper's loss by loops over pairs, both margins 1, lambda_div 1."""
    total = 0.0
    for i in range(len(LABELS)):
        for j in range(len(LABELS)):
            for m in range(LEARNERS):
                distance = (embeddings[i, m] - embeddings[j, m]).square().sum()
                same = LABELS[i] == LABELS[j]
                total = total + (distance if same else torch.relu(1 - distance))
        distance = (embeddings[i, 0] - embeddings[i, 1]).square().sum()
        total = total + torch.relu(1 - distance)
    return total / len(LABELS)


def _our_gradient(model, images):
    """Of the loss in training, by batch statistics where there are any."""
    model = nnx.view(model, use_running_average=False, raise_if_not_found=False)
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    params, others = (
        jax.tree.map(lambda x: x.astype(np.float64), nnx.to_pure_dict(state))
        for state in (params, others)
    )

    def step(params, others, images):
        def loss(params):
            net = nnx.merge(graphdef, nnx.State(params), nnx.State(others), copy=True)
            embeddings = net(images)
            divergence = losses.divergence_loss(embeddings)
            return losses.contrastive_loss(embeddings, jnp.asarray(LABELS)) + divergence

        return jax.value_and_grad(loss)(params)

    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P(), P()), out_specs=P(), check_vma=False
    )
    # The emitters that tests take, as they compile sooner, get one sum of a ResNet's
    # gradient wrong (jaxlib 0.10.2). Users' programs have the others, as newer XLA has.
    options = {}
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        options["xla_cpu_use_fusion_emitters"] = True
    step = jax.jit(mapped, compiler_options=options)
    loss, gradient = step(params, others, images)
    return loss, traverse_util.flatten_dict(gradient)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet50", 64),
        ("vit_small_patch16", 48),
        ("vit_small_patch14_reg4_dinov2", 42),
    ],
)
def test_the_gradient_of_abe_agrees(name, size, request, tmp_path):
    """Every parameter's, of contrastive and divergence loss, in float64."""
    net = _net(name, request)
    file = _saved(net, tmp_path)
    sizes = {"num_learners": LEARNERS, "embedding_dim": 8 * LEARNERS, "width": 1.0}
    section = {"name": "abe", "trunk": name, "pretrained": file, **sizes}
    model = models.create(ConfigDict(section), rngs=nnx.Rngs(0))
    cut = resnet50 if name == "resnet50" else transformer
    peer = cut(net.train().double(), size // TRUNKS[name].preprocessing.multiple_of)
    trunk = TRUNKS[name]
    channels = trunk.channels(trunk.branches[0])
    abe = ABE(peer, channels, trunk.channels(trunk.stages[-1]))
    for ours, theirs in (
        (model.attention_branch.last, abe.last),
        (model.head, abe.head),
    ):
        kernel = np.asarray(ours.kernel[...])
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        theirs.weight.data = torch.from_numpy(kernel.transpose(axes).copy())
        theirs.bias.data = torch.from_numpy(np.array(ours.bias[...]))
        theirs.double()
    images = torch.randn(len(LABELS), 3, size, size, dtype=torch.float64)
    with jax.enable_x64(True):
        loss, gradient = _our_gradient(model, _channels_last(images))
    expected = _reference_loss(abe.embed(images))
    expected.backward()
    references = abe.gradients(trunk.namings[0])
    assert gradient.keys() == references.keys()
    errors = {k: _error(gradient[k], v) for k, v in references.items()}
    worst = max(errors, key=lambda k: errors[k])
    print(f"loss {_error(loss, expected):.1e}, {worst} {errors[worst]:.1e}")
    assert _error(loss, expected) <= 1e-5
    # Of ViTs, positions and their filter are float32.
    assert errors[worst] <= 1e-5, worst

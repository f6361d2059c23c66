"""ABE-M in PyTorch, as a strong peer would write it: what the benchmarks compare with.

The same network on BVLC's trunk (`model.trunk = "googlenet"`) or on "resnet50", with
the same names.
Tensors are channels_last, all learners run as one batch, distances come from matrix
products. `tests/models/abe_torch_peer_test.py` holds its embeddings and loss to ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import resnet_torch
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

# In, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
_CHANNELS = {
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


class ConvUnit(nn.Module):
    """Convolution with bias, ReLU."""

    def __init__(self, source: int, channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(source, channels, kernel, stride, kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.conv(x), inplace=True)


class Inception(nn.Module):
    def __init__(self, block: str):
        super().__init__()
        source, one, three_reduce, three, five_reduce, five, pool = _CHANNELS[block]
        self.one = ConvUnit(source, one, 1)
        self.three_reduce = ConvUnit(source, three_reduce, 1)
        self.three = ConvUnit(three_reduce, three, 3)
        self.five_reduce = ConvUnit(source, five_reduce, 1)
        self.five = ConvUnit(five_reduce, five, 5)
        self.pool = ConvUnit(source, pool, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = (
            self.one(x),
            self.three(self.three_reduce(x)),
            self.five(self.five_reduce(x)),
            self.pool(functional.max_pool2d(x, 3, 1, 1)),
        )
        return torch.cat(branches, dim=1)


class Inception4(nn.Module):
    def __init__(self):
        super().__init__()
        for name in "abcde":
            self.add_module(f"inception_4{name}", Inception(f"4{name}"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in "abcde":
            x = self.get_submodule(f"inception_4{name}")(x)
        return x


class SpatialTrunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = ConvUnit(3, 64, 7, 2)
        self.conv2_reduce = ConvUnit(64, 64, 1)
        self.conv2 = ConvUnit(64, 192, 3)
        self.inception_3a = Inception("3a")
        self.inception_3b = Inception("3b")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _local_response_norm(_halve(self.conv1(x)))
        x = _local_response_norm(self.conv2(self.conv2_reduce(x)))
        return _halve(self.inception_3b(self.inception_3a(_halve(x))))


class GlobalTrunk(Inception4):
    def __init__(self):
        super().__init__()
        self.inception_5a = Inception("5a")
        self.inception_5b = Inception("5b")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inception_5b(self.inception_5a(_halve(super().forward(x))))
        return x.mean(dim=(2, 3))


class Attention(nn.Module):
    def __init__(self, num_learners: int, common: nn.Module, maps: int, deep: int):
        super().__init__()
        self.common = common
        self.last = nn.Conv2d(deep, maps * num_learners, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.last(self.common(x)))


class ABE(nn.Module):
    """ABE-M: preprocessed images `[B, 3, H, W]` to unit vectors `[B, M, D/M]`."""

    def __init__(self, num_learners: int, embedding_dim: int, trunk: str = "googlenet"):
        super().__init__()
        spatial, common, features, (maps, deep, wide) = _PARTS[trunk]
        self.num_learners = num_learners
        self.spatial = spatial()
        self.global_features = features()
        self.attention_branch = Attention(num_learners, common(), maps, deep)
        self.head = nn.Linear(wide, embedding_dim // num_learners)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.spatial(images)
        masks = self.attention_branch(maps)
        batch, channels, height, width = maps.shape
        masks = masks.view(batch, self.num_learners, channels, height, width)
        masked = (maps[:, None] * masks).flatten(0, 1)
        masked = masked.contiguous(memory_format=torch.channels_last)
        embeddings = self.head(self.global_features(masked)).float()
        embeddings = embeddings.view(batch, self.num_learners, -1)
        return functional.normalize(embeddings, dim=-1)


# S, what the attention branch copies, G, and channels of their outputs.
_PARTS: dict[str, tuple[Any, Any, Any, tuple[int, int, int]]] = {
    "googlenet": (SpatialTrunk, Inception4, GlobalTrunk, (480, 832, 1024)),
    "resnet50": (
        resnet_torch.SpatialTrunk,
        resnet_torch.Common,
        resnet_torch.GlobalTrunk,
        resnet_torch.CHANNELS,
    ),
}


def preprocess(
    images: np.ndarray, device: str, trunk: str = "googlenet"
) -> torch.Tensor:
    """uint8 RGB `[B, H, W, 3]` to what the trunk takes, `[B, 3, H, W]`."""
    if trunk == "resnet50":
        channels = torch.from_numpy(images).float() - torch.tensor(resnet_torch.MEAN)
        channels /= torch.tensor(resnet_torch.STD)
    else:
        mean = torch.tensor([104.0, 117.0, 123.0])
        channels = torch.from_numpy(images).flip(-1).float() - mean
    by_channel = channels.permute(0, 3, 1, 2).to(device)
    return by_channel.contiguous(memory_format=torch.channels_last)


def loss_of(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Contrastive and divergence loss, both margins and lambda_div 1."""
    batch, learners, _ = embeddings.shape
    by_learner = embeddings.transpose(0, 1)
    distances = 2 - 2 * by_learner @ by_learner.mT
    positive = labels[:, None] == labels[None, :]
    pairs = torch.where(positive, distances, functional.relu(1 - distances))
    between = 2 - 2 * embeddings @ embeddings.mT
    upper = torch.ones(learners, learners, device=embeddings.device).triu(1)
    return (pairs.sum() + (functional.relu(1 - between) * upper).sum()) / batch


def copy_weights(net: ABE, params: Mapping[tuple[str, ...], Any]) -> None:
    """Gives `net` our parameters, a flat dict by path; every tensor must be there."""
    state = {}
    for path, value in params.items():
        array = np.asarray(value)
        if path[-1] == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}[path[-1]]
        state[".".join((*path[:-1], leaf))] = torch.from_numpy(array.copy())
    missing, unexpected = net.load_state_dict(state, strict=False)
    buffers = {name for name, _ in net.named_buffers()}
    assert not unexpected and buffers.issuperset(missing)


def _halve(x: torch.Tensor) -> torch.Tensor:
    return functional.max_pool2d(x, 3, 2, ceil_mode=True)


def _local_response_norm(x: torch.Tensor) -> torch.Tensor:
    """As `functional.local_response_norm(x, 5)`, whose 3-d pooling is slower."""
    channels = x.shape[1]
    squares = functional.pad(x.square(), (0, 0, 0, 0, 2, 2))
    parts = (squares[:, i : i + channels] for i in range(1, 5))
    total = sum(parts, squares[:, :channels])
    scale = 1 + 1e-4 / 5 * total
    return x * torch.rsqrt(scale * torch.sqrt(scale))

"""ResNet-50's parts in PyTorch, with the names of `abe_jax.models.resnet`."""

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

# Blocks, and channels of their 3 x 3 convolutions.
_LAYERS = {
    "layer1": (3, 64),
    "layer2": (4, 128),
    "layer3": (6, 256),
    "layer4": (3, 512),
}
# Channels of S's maps, of the attention's maps and of the features.
CHANNELS = (1024, 2048, 2048)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class ConvNorm(nn.Module):
    def __init__(self, source: int, channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(source, channels, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    def __init__(self, source: int, narrow: int, stride: int):
        super().__init__()
        self.reduce = ConvNorm(source, narrow, 1)
        self.three = ConvNorm(narrow, narrow, 3, stride)
        self.expand = ConvNorm(narrow, 4 * narrow, 1)
        changes = stride != 1 or source != 4 * narrow
        self.shortcut = ConvNorm(source, 4 * narrow, 1, stride) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.reduce(x), inplace=True)
        y = self.expand(functional.relu(self.three(y), inplace=True))
        y += x if self.shortcut is None else self.shortcut(x)
        return functional.relu(y, inplace=True)


class Layers(nn.Module):
    """Layers in a row; the first block of each but layer1 halves the maps, if asked."""

    def __init__(self, *names: str, halve: bool = True):
        super().__init__()
        for name in names:
            blocks, narrow = _LAYERS[name]
            for i in range(blocks):
                before = 64 if name == "layer1" else 2 * narrow
                source = 4 * narrow if i else before
                stride = 2 if halve and i == 0 and name != "layer1" else 1
                self.add_module(f"{name}_{i}", Bottleneck(source, narrow, stride))
        self.blocks = [name for name, _ in self.named_children()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x


class SpatialTrunk(Layers):
    def __init__(self):
        super().__init__("layer1", "layer2", "layer3")
        self.conv1 = ConvNorm(3, 64, 7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.conv1(x), inplace=True)
        return super().forward(functional.max_pool2d(x, 3, 2, 1))


class Common(Layers):
    def __init__(self):
        super().__init__("layer4", halve=False)


class GlobalTrunk(Layers):
    def __init__(self):
        super().__init__("layer4")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean(dim=(2, 3))

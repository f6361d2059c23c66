"""How published ResNet-50s name their tensors: torchvision and timm alike."""

from abe_jax.models.naming import Naming

TORCHVISION = Naming(
    network="torchvision's or timm's resnet50",
    architectures=("resnet50",),
    rows=(
        (r"conv1\.weight", "conv1.conv.kernel"),
        (r"bn1\.(?P<leaf>\w+)", "conv1.norm.{leaf}"),
        (
            r"(?P<layer>layer[1-4])\.(?P<block>\d)\.conv(?P<unit>[123])\.weight",
            "{layer}_{block}.{unit}.conv.kernel",
        ),
        (
            r"(?P<layer>layer[1-4])\.(?P<block>\d)\.bn(?P<unit>[123])\.(?P<leaf>\w+)",
            "{layer}_{block}.{unit}.norm.{leaf}",
        ),
        (
            r"(?P<layer>layer[1-4])\.(?P<block>\d)\.downsample\.0\.weight",
            "{layer}_{block}.shortcut.conv.kernel",
        ),
        (
            r"(?P<layer>layer[1-4])\.(?P<block>\d)\.downsample\.1\.(?P<leaf>\w+)",
            "{layer}_{block}.shortcut.norm.{leaf}",
        ),
    ),
    words={
        "unit": {"1": "reduce", "2": "three", "3": "expand"},
        "leaf": {
            "weight": "scale",
            "bias": "bias",
            "running_mean": "mean",
            "running_var": "var",
        },
    },
    skipped={
        r"fc\..*": "classifier",
        r".*\.num_batches_tracked": "counters of batch norm",
    },
)

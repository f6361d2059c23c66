"""How published GoogLeNets name their tensors.

BVLC's is that of the ONNX model zoo, torchvision's a state dict of its `googlenet`. The
classifiers are left out.
"""

from abe_jax.models.naming import Naming

BVLC = Naming(
    network="BVLC's GoogLeNet (ONNX model zoo)",
    rows=(
        (r"conv1/7x7_s2_(?P<leaf>[wb])_0", "conv1.conv.{leaf}"),
        (r"conv2/3x3_reduce_(?P<leaf>[wb])_0", "conv2_reduce.conv.{leaf}"),
        (r"conv2/3x3_(?P<leaf>[wb])_0", "conv2.conv.{leaf}"),
        (
            r"inception_(?P<block>[345][a-e])/(?P<branch>\w+)_(?P<leaf>[wb])_0",
            "inception_{block}.{branch}.conv.{leaf}",
        ),
    ),
    words={
        "branch": {
            "1x1": "one",
            "3x3_reduce": "three_reduce",
            "3x3": "three",
            "5x5_reduce": "five_reduce",
            "5x5": "five",
            "pool_proj": "pool",
        },
        "leaf": {"w": "kernel", "b": "bias"},
    },
    skipped={
        r"loss3/.*": "1000-way classifier",
        r"loss[12]/.*": "auxiliary classifiers",
        r"OC2_DUMMY_\d+": "shapes of the classifier's reshapes",
    },
)

TORCHVISION = Naming(
    network="torchvision's googlenet",
    rows=(
        (r"(?P<stem>conv[123])\.(?P<leaf>.+)", "{stem}.{leaf}"),
        (
            r"inception(?P<block>[345][a-e])\.branch(?P<branch>[\d.]+)\.(?P<leaf>.+)",
            "inception_{block}.{branch}.{leaf}",
        ),
    ),
    words={
        "stem": {"conv1": "conv1", "conv2": "conv2_reduce", "conv3": "conv2"},
        "branch": {
            "1": "one",
            "2.0": "three_reduce",
            "2.1": "three",
            "3.0": "five_reduce",
            "3.1": "five",
            "4.1": "pool",
        },
        "leaf": {
            "conv.weight": "conv.kernel",
            "bn.weight": "norm.scale",
            "bn.bias": "norm.bias",
            "bn.running_mean": "norm.mean",
            "bn.running_var": "norm.var",
        },
    },
    skipped={
        r"fc\..*": "1000-way classifier",
        r"aux[12]\..*": "auxiliary classifiers",
        r".*\.num_batches_tracked": "counters of batch norm",
    },
)

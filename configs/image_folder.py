"""ABE-8^512 on any folder of images, one folder a class, 224 x 224.

    python -m abe_jax.main --config=configs/image_folder.py --workdir=runs/photos \\
        --config.data.path=photos --config.model.pretrained=googlenet-12.onnx

Prepare it first where reading is the slow part; the same command then takes DATA:

    python -m abe_jax.prepare --dataset=image_folder --source=photos --data_dir=DATA

Protocol: the first half of the sorted classes trains, the second half tests, or the
folders `train/` and `test/`; every test image is a query among the others. The paper
has no such data set. Batches, loss and SGD with momentum are the paper's, all else is
ours (`configs/default.py`); choose it with --config.data.validation_fraction=0.2.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """The defaults, on a folder of images."""
    config = default.get_config()
    config.update({"data": {"name": "image_folder"}})
    return config

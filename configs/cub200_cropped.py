"""ABE-8^512 on CUB-200-2011, cropped to the bounding boxes, 224 x 224.

    python -m abe_jax.prepare --dataset=cub200 --source=SOURCE \\
        --data_dir=DATA --size=512
    python -m abe_jax.main --config=configs/cub200_cropped.py \\
        --workdir=runs/cub200_cropped --config.data.path=DATA \\
        --config.model.pretrained=googlenet-12.onnx

Protocol: that of `configs/cub200.py`, on the bounding boxes that come with the data
set, in training and in testing.

Paper: Recall@1 of 70.6, not to be compared with that on whole images. Not
reproduced here yet: this project has not trained on the real images.

The box is cut out when a record is read, so the records must be large enough: with
--size=512 (ours) a box of half the image's side still has 256 pixels. It is padded to a
square, as everywhere; --config.data.square=squeeze fills the square with it.
All else is that of `configs/cub200.py`.
"""

from ml_collections import ConfigDict

from configs import cub200


def get_config() -> ConfigDict:
    """As `cub200`, on boxes."""
    config = cub200.get_config()
    config.update({"data": {"box_crop": True}})
    return config

"""ABE-8^512 with ResNet-50 (ours) on Cars-196, whole images, 224 x 224.

    python -m abe_jax.prepare --dataset=cars196 --source=SOURCE --data_dir=DATA
    python -m abe_jax.main --config=configs/cars196_resnet50.py \\
        --workdir=runs/cars196_resnet50 --config.data.path=DATA \\
        --config.model.pretrained=hf://timm/resnet50.tv_in1k

Data, protocol, batches and losses are those of `configs/cars196.py`. The paper has
GoogLeNet only: there is no figure of it to compare with, and this project has not
trained on the real images. Batch norm is frozen, as most recipes of metric learning do
it. Choose settings with --config.data.validation_fraction=0.2.
"""

from ml_collections import ConfigDict

from configs import cars196


def get_config() -> ConfigDict:
    """The paper's protocol on Cars-196, on another trunk."""
    config = cars196.get_config()
    config.update({"model": {"trunk": "resnet50", "freeze_batch_norm": True}})
    return config

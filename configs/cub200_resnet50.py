"""ABE-8^512 with ResNet-50 (ours) on CUB-200-2011, whole images, 224 x 224.

    python -m abe_jax.prepare --dataset=cub200 --source=SOURCE --data_dir=DATA
    python -m abe_jax.main --config=configs/cub200_resnet50.py \\
        --workdir=runs/cub200_resnet50 --config.data.path=DATA \\
        --config.model.pretrained=hf://timm/resnet50.tv_in1k

Data, protocol, batches and losses are those of `configs/cub200.py`. The paper has
GoogLeNet only: there is no figure of it to compare with, and this project has not
trained on the real images. Batch norm is frozen, as most recipes of metric learning do
it. Choose settings with --config.data.validation_fraction=0.2.
"""

from ml_collections import ConfigDict

from configs import cub200


def get_config() -> ConfigDict:
    """The paper's protocol on CUB-200-2011, on another trunk."""
    config = cub200.get_config()
    config.update({"model": {"trunk": "resnet50", "freeze_batch_norm": True}})
    return config

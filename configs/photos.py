"""ABE-4 on a frozen DINOv2: your own photos, minutes on a CPU.

    pip install -e '.[hub]'
    python -m abe_jax.main --config=configs/photos.py --workdir=runs/photos_dinov2 \\
        --config.data.path=photos

The trunk, a ViT-S/14, keeps its published weights (87 MB, fetched once). Its output is
computed once an image and kept in `data.feature_cache`, 0.4 MB each; on it masks and
embeddings of four learners are trained. All of it is ours: the paper trains a GoogLeNet
whole. Not measured on real photos here. For more than heads, on an accelerator:
--config.model.train=all --config.data.feature_cache= --config.model.branch=block6, with
augmentation (--config.augment.crop=area --config.augment.flip=0.5) and a lower
train.learning_rate, which we have not tuned.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Masks and heads behind the last block, no augmentation, AdamW."""
    config = default.get_config()
    config.update(
        {
            "model": {
                "trunk": "vit_small_patch14_dinov2",
                "pretrained": "hf://timm/vit_small_patch14_dinov2.lvd142m",
                "branch": "block12",
                "train": "heads",
                "num_learners": 4,
                "embedding_dim": 256,
            },
            "data": {
                "load_size": 224,
                "image_size": 224,
                "feature_cache": "~/.cache/abe_jax/features",
            },
            "augment": {"crop": "centre", "flip": 0.0},
            "train": {
                "steps": 500,
                "optimizer": "adamw",
                "learning_rate": 1e-3,
                "weight_decay": 0.02,
                "warmup_steps": 20,
                "eval_every": 500,
                "checkpoint_every": 100,
                "log_every": 20,
            },
        }
    )
    return config

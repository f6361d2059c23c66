"""ABE-4 on generated birds: no download, a few minutes on two cores.

    python -m abe_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

128 species train, 32 others test; every image is drawn by
`abe_jax/data/datasets/birds.py`. Batches are the paper's, of positive and negative
pairs. The rate is so high because at half of it the divergence loss keeps the learners
of some seeds from learning in so few steps (docs/results.md). All settings are ours,
for a short run; the drawing and they were tuned by looking at such runs, so the figure
shows that training works and compares with nothing.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """A small trunk with batch norm, small images, AdamW."""
    config = default.get_config()
    config.update(
        {
            "model": {
                "trunk": "googlenet_bn",
                "num_learners": 4,
                "embedding_dim": 128,
                "width": 0.25,
            },
            "data": {
                "name": "birds",
                "load_size": 64,
                "image_size": 64,
                "sampler": "pairs",
                "birds_classes": 160,
                "birds_images_per_class": 40,
                "in_memory": True,
            },
            "augment": {
                "crop": "area",
                "crop_area": (0.9, 1.0),
                "brightness": 0.1,
                "contrast": 0.2,
            },
            "train": {
                "steps": 1200,
                "optimizer": "adamw",
                "learning_rate": 8e-3,
                "weight_decay": 0.02,
                "warmup_steps": 50,
                "eval_every": 600,
                "checkpoint_every": 300,
            },
        }
    )
    return config

"""ABE-4 on generated birds: no download, a few minutes on two cores.

    python -m abe_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

64 species train, 64 others test. All settings are choices of ours for a short run.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """A small trunk, small images, batch norm, AdamW."""
    config = default.get_config()
    config.model.update(
        trunk="googlenet_bn", num_learners=4, embedding_dim=128, width=0.25
    )
    config.data.update(
        name="birds",
        load_size=64,
        image_size=64,
        sampler="classes",
        images_per_class=4,
        in_memory=True,
    )
    config.augment.update(brightness=0.1, contrast=0.2, crop_area=(0.6, 1.0))
    config.train.update(
        steps=600,
        optimizer="adamw",
        learning_rate=2e-3,
        warmup_steps=50,
        eval_every=200,
        checkpoint_every=200,
    )
    return config

"""ABE on emoji: nine artists' drawings of 1,364 emoji, 64 x 64 pixels.

    python -m abe_jax.main --config=configs/emoji64.py --workdir=runs/emoji64 \
        --config.data.path=emoji64.zip
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """From scratch, on a CPU."""
    config = default.get_config()
    config.model.update(
        trunk="googlenet_bn", num_learners=4, embedding_dim=256, width=0.5
    )
    config.data.update(
        load_size=64,
        image_size=64,
        sampler="classes",
        images_per_class=8,
        in_memory=True,
    )
    config.augment.update(
        crop_area=(0.6, 1.1),
        brightness=0.2,
        contrast=0.4,
        saturation=0.6,
        hue=0.1,
        grey=0.3,
        erase=0.1,
    )
    config.train.update(
        steps=4500,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup_steps=100,
        eval_every=1500,
        checkpoint_every=500,
    )
    return config

"""ABE-4 on emoji: nine artists' drawings of 1,364 emoji, 64 x 64 pixels, from scratch.

    python -m abe_jax.main --config=configs/emoji64.py --workdir=runs/emoji64 \\
        --config.data.path=emoji64

`python -m studies.emoji64 --output=emoji64` makes the drawings; it needs Node.js's
`npm` and `pip install resvg-py`. The first half of the sorted classes trains, the
second half tests: 4,072 queries of 682 classes that were never seen. 16 x 16 raw pixels
reach Recall@1 0.26, this 0.493 (seed 0, 70 minutes on one busy core, 8887faf). All
settings are ours; the paper has no such data set. The loss was chosen on validation
classes with one head (docs/results.md): the paper's contrastive loss,
`--config.loss.name=contrastive`, learns more slowly there.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Half the paper's width, batch norm, AdamW: for a CPU."""
    config = default.get_config()
    config.update(
        {
            "model": {
                "trunk": "googlenet_bn",
                "num_learners": 4,
                "embedding_dim": 256,
                "width": 0.5,
            },
            "loss": {"name": "multi_similarity"},
            "data": {
                "load_size": 64,
                "image_size": 64,
                "sampler": "classes",
                "images_per_class": 8,
                "in_memory": True,
            },
            # The artists differ in colour and line more than in shape.
            "augment": {
                "crop": "area",
                "crop_area": (0.6, 1.1),
                "brightness": 0.2,
                "contrast": 0.4,
                "saturation": 0.6,
                "hue": 0.1,
                "grey": 0.3,
                "erase": 0.1,
            },
            "train": {
                "steps": 4500,
                "optimizer": "adamw",
                "learning_rate": 2e-3,
                "weight_decay": 0.05,
                "warmup_steps": 100,
                "eval_every": 1500,
                "checkpoint_every": 500,
            },
        }
    )
    return config

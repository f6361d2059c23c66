"""A model's card: what it is, what it was trained on, how well it does."""

import importlib.metadata
import platform
from typing import Any

import abe_jax
from abe_jax.apply.trained import Trained
from abe_jax.data.datasets import DATASETS
from abe_jax.workdir import fields

_MODELS = {
    "abe": "Attention-based Ensemble (Kim et al., ECCV 2018)",
    "m_heads": "M-heads, the baseline of Kim et al., ECCV 2018",
    "one_head": "1-head, the baseline of Kim et al., ECCV 2018",
}
_PACKAGES = ("jax", "flax", "numpy", "pillow")


def describe(model: Trained) -> dict[str, Any]:
    """The card as JSON has it.

    Args:
      model: as returned by `abe_jax.load`.
    """
    config = fields.as_json(model.config)
    data = DATASETS[model.config.data.name]
    measured = ("num_queries", "num_gallery", "recall", "map_at_r", "learners")
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    size = model.config.data.load_size
    return {
        "model": f"{_MODELS[config['model']['name']]}, by abe_jax",
        "step": model.step,
        "input": f"uint8 RGB [B, {size}, {size}, 3]; how an image gets it: "
        "data.box_crop, then data.square",
        "output": f"float32 [B, {model.dim}], learners of unit length side by side; "
        f"their mean cosine is the inner product / {model.num_learners}",
        "data": {"name": data.name, "source": data.citation, "licence": data.licence},
        "protocol": model.protocol,
        "metrics": {k: v for k, v in model.evaluation.items() if k in measured},
        "metrics_step": model.evaluation.get("step"),
        "config": config,
        "versions": {
            "abe_jax": abe_jax.__version__,
            "python": platform.python_version(),
            **versions,
        },
    }

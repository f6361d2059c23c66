"""The rows of the study: what each changes in the config of its data set.

A row is one question. It changes as little as it can, so that its figures beside those
of "abe-4" are the answer. Budgets (steps and images a step) are equal in all rows of a
data set, unless the row's name says otherwise.
"""

import dataclasses
import importlib
from typing import Any

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A question to be asked of one data set, for several seeds.

    Attributes:
      overrides: fields of the config, by their dotted names.
      members: above 1, so many models are trained from different seeds and their
        embeddings concatenated; each gets its share of `embedding_dim`.
    """

    overrides: Overrides
    members: int = 1


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and the budget that all its rows have.

    Attributes:
      config: a name in `configs/`.
      overrides: what all rows change in it.
      start: whose "1-head", of the same seed, lends all rows the weights they start
        from, as ImageNet's do in the paper; None: they start at random.
    """

    config: str
    overrides: Overrides
    start: str | None = None


# The quickstart's until 2026-11-30.
_BIRDS: Overrides = {
    "train.steps": 1600,
    "train.learning_rate": 4e-3,
    "train.weight_decay": 0.02,
}
_EMOJI: Overrides = {
    "loss.name": "contrastive",
    "train.steps": 1200,
    "train.checkpoint_every": 200,
}
_PAIRS: Overrides = {"data.sampler": "pairs"}  # the paper's batches
_SLOW: Overrides = {"train.learning_rate": 2e-3}
_TUNE: Overrides = {"train.steps": 400, "train.learning_rate": 5e-4}
_NARROW: Overrides = {"model.width": 0.25}
_MULTI: Overrides = {"loss.name": "multi_similarity"}
_LONG: Overrides = _MULTI | {"train.steps": 3600, "train.checkpoint_every": 200}


def _pixels(side: int) -> Overrides:
    return {"data.load_size": side, "data.image_size": side}


DATA: dict[str, Data] = {
    "birds": Data(
        "quickstart",
        _BIRDS | _SLOW | {"data.sampler": "classes", "data.images_per_class": 4},
    ),
    "birds_pairs": Data("quickstart", _BIRDS | _PAIRS | _SLOW),
    "birds_fast": Data("quickstart", _BIRDS),
    # Shorter ones.
    "birds_1400": Data("quickstart", _BIRDS | {"train.steps": 1400}),
    "birds_1200": Data("quickstart", _BIRDS | {"train.steps": 1200}),
    # The quickstart as it is; its ABE-4 is the row "rate 0.008" of birds_1200.
    "birds_quickstart": Data("quickstart", {}),
    "birds_tuned": Data("quickstart", _BIRDS | _PAIRS | _TUNE, start="birds"),
    "emoji64_config": Data("emoji64", {}),  # as it is
    "emoji64": Data("emoji64", _EMOJI),
    "emoji64_pairs": Data("emoji64", _EMOJI | _PAIRS),
    "emoji64_tuned": Data("emoji64", _EMOJI | _PAIRS | _TUNE, start="emoji64"),
    # At half the width.
    "emoji64_narrow": Data("emoji64", _EMOJI | _NARROW),
    "emoji64_narrow_tuned": Data(
        "emoji64", _EMOJI | _NARROW | _PAIRS | _TUNE, start="emoji64_narrow"
    ),
    # The best that was found: what is tuned starts from longer training.
    "emoji64_long": Data("emoji64", _LONG),
    "emoji64_long_tuned": Data(
        "emoji64", _LONG | _TUNE | {"train.steps": 800}, start="emoji64_long"
    ),
    # Three times as long once more.
    "emoji64_longer": Data("emoji64", _LONG | {"train.steps": 10800}),
    "emoji64_longer_tuned": Data(
        "emoji64", _LONG | _TUNE | {"train.steps": 800}, start="emoji64_longer"
    ),
}

_ONE: Overrides = _MULTI | {"model.name": "one_head"}
_COLOURS = ("brightness", "contrast", "saturation", "hue", "grey")
_PROXY: Overrides = {"loss.name": "proxy_anchor", "train.loss_factor": 100.0}
_EIGHT: Overrides = {"model.num_learners": 8}
_LARGE: Overrides = {"model.embedding_dim": 512} | _pixels(96)
_HEADS: Overrides = {"model.name": "m_heads", "loss.divergence_weight": 0.0}


ROWS: dict[str, Row] = {
    "abe-4": Row({}),
    # The paper's tables 1 to 3.
    "1-head": Row({"model.name": "one_head"}),
    **{f"abe-{m}": Row({"model.num_learners": m}) for m in (1, 2, 8)},
    **{f"{m}-heads": Row({**_HEADS, "model.num_learners": m}) for m in (2, 4, 8)},
    "4-heads, L_div": Row({**_HEADS, "loss.divergence_weight": 1.0}),
    # The honest peer: 3 take somewhat more multiply-adds than ABE-4 (which takes 2.5 of
    # one head's on birds, 2.7 on emoji64), 2 about its training time on a CPU.
    **{f"{n} x 1-head": Row({"model.name": "one_head"}, members=n) for n in (3, 2)},
    # The paper's figure 7.
    **{f"lambda {x:g}": Row({"loss.divergence_weight": x}) for x in (0.0, 0.1, 8, 64)},
    **{f"blocks {n}": Row({"model.attention_blocks": n}) for n in (1, 2, 3, 4, 6, 7)},
    **{f"branch {b}": Row({"model.branch": b}) for b in ("pool2", "3a", "4a", "4b")},
    # What keeps the learners alike? One hypothesis a row.
    **{
        f"K {k}": Row({"data.sampler": "classes", "data.images_per_class": k})
        for k in (2, 4, 8, 16)
    },
    "pairs": Row(_PAIRS),
    "spread 4": Row({"model.attention_spread": 4.0}),
    "no batch norm": Row({"model.trunk": "googlenet"}),
    "frozen batch norm": Row({"model.freeze_batch_norm": True}),
    **{f"D {d}": Row({"model.embedding_dim": d}) for d in (32, 64, 256, 512)},
    "pixels 96": Row(_pixels(96)),
    **{f"width {w:g}": Row({"model.width": w}) for w in (0.125, 0.25, 0.5, 1.0)},
    **{
        f"rate {r:g}": Row({"train.learning_rate": r}) for r in (5e-4, 1e-3, 4e-3, 8e-3)
    },
    "bfloat16": Row({"model.dtype": "bfloat16"}),
    # Other losses of each learner, chosen with one learner.
    "multi-similarity": Row(_MULTI),
    "1-head, multi-similarity": Row(_ONE),
    "1-head, multi-similarity, rate 0.004": Row(_ONE | {"train.learning_rate": 4e-3}),
    "1-head, multi-similarity, K 4": Row(_ONE | {"data.images_per_class": 4}),
    # Why does it not even learn its training classes? Too few positions, or images
    # that were changed too much, mirrored, covered.
    "1-head, multi-similarity, pixels 96": Row(_ONE | _pixels(96)),
    "1-head, multi-similarity, no flip": Row(_ONE | {"augment.flip": 0.0}),
    "1-head, multi-similarity, no colours": Row(
        _ONE | {f"augment.{name}": 0.0 for name in _COLOURS}
    ),
    "1-head, multi-similarity, no erasing": Row(_ONE | {"augment.erase": 0.0}),
    "1-head, multi-similarity, more colours": Row(
        _ONE
        | {"augment.brightness": 0.3, "augment.contrast": 0.6, "augment.hue": 0.3}
        | {"augment.saturation": 0.9, "augment.grey": 0.5}
    ),
    "1-head, multi-similarity, width 1": Row(_ONE | {"model.width": 1.0}),
    # What makes the best ABE-8 better?
    "abe-8, D 512": Row(_EIGHT | {"model.embedding_dim": 512}),
    "abe-8, pixels 96": Row(_EIGHT | _pixels(96)),
    "1-head, D 512, pixels 96": Row({"model.name": "one_head"} | _LARGE),
    "abe-8, D 512, pixels 96": Row(_EIGHT | _LARGE),
    "abe-8, contrastive, pairs": Row(_PAIRS | _EIGHT | {"loss.name": "contrastive"}),
    "proxy-anchor": Row(_PROXY),
    "1-head, proxy-anchor": Row(_PROXY | {"model.name": "one_head"}),
    # At their authors' rate itself, in place of a hundred times ours.
    "1-head, proxy-anchor, proxies at 0.01": Row(
        _PROXY | {"model.name": "one_head", "train.loss_factor": 5.0}
    ),
    **{f"weight decay {w:g}": Row({"train.weight_decay": w}) for w in (0.2, 1.0)},
}


def config_of(
    data: str, row: str, seed: int, part: str, path: str | None = None
) -> Any:
    """The config of a run.

    Args:
      data: a key of `DATA`.
      row: a key of `ROWS`.
      seed: of weights, batches and augmentation.
      part: "validation" (a fifth of the training classes, for choosing settings) or
        "test".
      path: `data.path`, where the data set has one.
    """
    config = importlib.import_module(f"configs.{DATA[data].config}").get_config()
    own: Overrides = {
        "seed": seed,
        "data.validation_fraction": 0.2 if part == "validation" else 0.0,
    }
    if path:
        own["data.path"] = path
    config.update_from_flattened_dict(DATA[data].overrides | ROWS[row].overrides | own)
    config.train.eval_every = config.train.steps  # untrained, and at the end
    return config

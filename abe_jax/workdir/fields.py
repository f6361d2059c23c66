"""The fields of a config: what each may be, and which may change in a run's life.

A field that is not named here may be anything, and stays as it was at the first start.
Names, such as of models, samplers and optimisers, are checked where they are listed.
"""

import dataclasses
import difflib
import json
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from abe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a field may have.

    Attributes:
      holds: whether a value is one of them.
      words: what they are, to follow "it must be".
    """

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _whole(low: int, high: int) -> Range:
    def holds(value: Any) -> bool:
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return is_whole and low <= int(value) <= high

    return Range(holds, f"a whole number from {low} to {high}")


def _number(low: float, high: float = 1e9, *, above: bool = False) -> Range:
    def holds(value: Any) -> bool:
        return _is_number(value) and low <= value <= high and not (above and value <= 0)

    return Range(holds, f"a number {'above' if above else 'from'} {low:g} to {high:g}")


def _is_pair_of_areas(value: Any) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(map(_is_number, value)) and 0 < value[0] <= value[1] <= 100


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(x, str) for x in value)


def _are_ranks(value: Any) -> bool:
    if not isinstance(value, tuple | list) or not value:
        return False
    return all(map(_whole(1, 2**31 - 1).holds, value)) and len({*value}) == len(value)


_STEPS = _whole(1, 2**31 - 2)  # the step is an int32
_PROBABILITY = _number(0, 1)

RANGES: Mapping[str, Range] = {
    "seed": _whole(0, 2**32 - 1),
    "model.num_learners": _whole(1, 1024),
    "model.embedding_dim": _whole(1, 2**16),
    "model.width": _number(0, 16, above=True),
    "model.attention_spread": _number(0, 1000, above=True),
    "loss.margin": _number(0),
    "loss.divergence_margin": _number(0),
    "loss.divergence_weight": _number(0),
    "loss.multi_similarity.alpha": _number(0, above=True),
    "loss.multi_similarity.beta": _number(0, above=True),
    "loss.multi_similarity.base": _number(-1, 1),
    "loss.multi_similarity.epsilon": _number(0, 2),
    "loss.proxy_anchor.margin": _number(0, 2),
    "loss.proxy_anchor.alpha": _number(0, above=True),
    "data.load_size": _whole(1, 4096),
    "data.image_size": _whole(1, 4096),
    "data.images_per_class": _whole(2, 2**20),
    "data.validation_fraction": Range(
        lambda value: _is_number(value) and 0 <= value < 1, "0, or a number below 1"
    ),
    "data.num_threads": _whole(1, 1024),
    "data.num_workers": _whole(0, 256),
    "data.birds_classes": _whole(2, 2**20),
    "data.birds_images_per_class": _whole(1, 2**20),
    "augment.crop_area": Range(
        _is_pair_of_areas, "two numbers above 0, the smaller first, such as (0.3, 1.0)"
    ),
    "augment.crop_aspect": _number(1, 100),
    "augment.flip": _PROBABILITY,
    "augment.brightness": _number(0, 1),
    "augment.contrast": _number(0, 1),
    "augment.saturation": _number(0, 1),
    "augment.hue": _number(0, 1),
    "augment.grey": _PROBABILITY,
    "augment.erase": _PROBABILITY,
    "train.steps": _STEPS,
    "train.batch_size": _whole(2, 2**20),
    "train.learning_rate": _number(0, 3e38, above=True),
    "train.momentum": Range(
        lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"
    ),
    "train.weight_decay": _number(0),
    "train.warmup_steps": _whole(0, 2**31 - 2),
    "train.decay_every": _STEPS,
    "train.decay_rate": _number(0, 1, above=True),
    "train.clip_norm": _number(0),
    "train.new_layer_factor": _number(0),
    "train.loss_factor": _number(0),
    "train.chunks": _whole(1, 2**20),
    "train.log_every": _STEPS,
    "train.eval_every": _STEPS,
    "train.checkpoint_every": _STEPS,
    "train.keep_checkpoints": _whole(1, 10**6),
    "train.profile_steps": _whole(0, 1000),
    "train.trackers": Range(_are_names, "a tuple of names, such as ('wandb',)"),
    "eval.batch_size": _whole(1, 2**20),
    "eval.recall_at": Range(
        _are_ranks, "different whole numbers from 1, such as (1, 2, 4, 8)"
    ),
}

# They change nothing in the result: where files lie, how fast, what is logged.
FREE_FIELDS = (
    "model.pretrained",  # read once, at the first start
    "model.rematerialize",
    "model.learners_in_turn",
    "data.path",
    "data.in_memory",
    "data.feature_cache",
    "data.num_threads",
    "data.num_workers",
    "eval.batch_size",
    "eval.recall_at",
    "parallel.mapping",
    "train.chunks",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.profile_steps",
    "train.trackers",
)
# Of those, what each of several processes may have of its own: where data lies, how it
# is read, and trackers, which only process 0 has. The others shape the program, or how
# often processes wait for each other; weights are read from a path without comparison.
PER_PROCESS_FIELDS = (
    "data.path",
    "data.in_memory",
    "data.num_threads",
    "data.num_workers",
    "train.trackers",
)
# They may change between starts, and steer what follows: to train longer, say, or to go
# on after a loss that was not finite.
# `changes.jsonl` keeps what was changed, and at which step.
STEERING_FIELDS = (
    "train.steps",
    "train.learning_rate",
    "train.schedule",
    "train.warmup_steps",
    "train.decay_every",
    "train.decay_rate",
    "train.clip_norm",
    "train.weight_decay",
    "loss.divergence_weight",
)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a config by their full names, such as "train.steps"."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def as_json(config: Any) -> dict[str, Any]:
    """A config as files of a run hold it."""
    return json.loads(config.to_json_best_effort())


def require_in_range(config) -> None:
    """Checks every field of a config that has a range.

    Raises:
      UserError: the first field whose value is outside it.
    """
    for name, value in flat(config).items():
        allowed = RANGES.get(name)
        if allowed is not None and not allowed.holds(value):
            raise UserError(f"{name} is {value!r}; it must be {allowed.words}.")


def require_known(config, defaults: Mapping[str, Any]) -> None:
    """Checks that a config has no field but the known ones, and all of them.

    Args:
      config: the whole config.
      defaults: full names and defaults of the fields of `configs/default.py`.

    Raises:
      UserError: a field is unknown, such as a misspelt one, missing, or of another
        type.
    """
    found = flat(config)
    for name, value in found.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see configs/default.py."
            raise UserError(
                f"the config has a field {name!r}, which is unknown; {hint}"
            )
        default = defaults[name]
        if isinstance(default, bool | str) and not isinstance(value, type(default)):
            raise UserError(
                f"{name} is {value!r}; it must be a {type(default).__name__}, such as "
                f"{default!r}."
            )
    missing = [name for name in defaults if name not in found]
    if missing:
        raise UserError(
            f"the config lacks {', '.join(missing)}; start from "
            "configs.default.get_config()."
        )

"""One table of ranges, known names, and every config of ours within both."""

import importlib
import math
import pathlib

import pytest

from abe_jax.errors import UserError
from abe_jax.workdir import fields
from configs import default, quickstart

CONFIGS = sorted(
    path.stem for path in pathlib.Path(default.__file__).parent.glob("*.py")
)


@pytest.mark.parametrize("name", CONFIGS)
def test_our_configs_are_in_range(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    fields.require_in_range(config)
    fields.require_known(config, fields.flat(default.get_config()))


def test_the_tables_name_fields_that_exist():
    known = fields.flat(default.get_config())
    for table in (fields.RANGES, fields.FREE_FIELDS, fields.STEERING_FIELDS):
        assert set(table) <= set(known)
    assert not set(fields.FREE_FIELDS) & set(fields.STEERING_FIELDS)
    assert set(fields.PER_PROCESS_FIELDS) <= set(fields.FREE_FIELDS)
    numbers = {k for k, v in known.items() if type(v) in (int, float)}
    assert numbers <= set(fields.RANGES)


BAD = {
    "train.batch_size": (0, -8, 1, 2**40, True),
    "seed": (-1, 2**64, 2**32),
    "train.clip_norm": (-1.0, math.nan, math.inf),
    "train.learning_rate": (-1.0, 0.0, math.nan),
    "train.steps": (0, -1, 2**31),
    "train.log_every": (0, -1),
    "train.eval_every": (0, -1),
    "train.checkpoint_every": (0, -1),
    "train.keep_checkpoints": (0, -1),
    "train.momentum": (1.0, -0.1),
    "augment.flip": (2.0, -1.0),
    "augment.hue": (5.0,),
    "augment.crop_area": ((), (1.0,), (1.0, 0.5), (0.0, 1.0), (0.5, math.nan)),
    "eval.recall_at": ((), (0,), (1, 1), (1.5,), ("1",)),
    "eval.batch_size": (0,),
    "train.trackers": (None, "wandb", (1,)),
    "data.num_threads": (0,),
    "data.num_workers": (-1,),
    "data.load_size": (0, -3),
    "data.images_per_class": (1, 0),
    "data.validation_fraction": (1.0, -0.5),
    "model.width": (0.0, -1.0, math.inf),
    "model.num_learners": (0,),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in BAD for value in BAD[name]], ids=str
)
def test_values_out_of_range_are_refused_by_name(name, value):
    config = quickstart.get_config().unlock()
    with config.ignore_type():
        config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError) as error:
        fields.require_in_range(config)
    assert str(error.value).startswith(f"{name} is {value!r}; it must be ")
    assert "\n" not in str(error.value)


def test_a_misspelt_field_is_told_with_what_was_meant():
    config = quickstart.get_config().unlock()
    config.train.stepz = 5
    known = fields.flat(default.get_config())
    with pytest.raises(
        UserError, match="'train.stepz', which is unknown; did you mean"
    ):
        fields.require_known(config, known)
    config = quickstart.get_config().unlock()
    del config.train.steps
    with pytest.raises(UserError, match="lacks train.steps"):
        fields.require_known(config, known)

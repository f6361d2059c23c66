"""Strict arithmetic and eight fake CPU devices for every test."""

import jax
import pytest
from absl import flags

# Before anything touches a device: multi-device truths are tested, never skipped.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Grain's worker processes read absl flags, which pytest does not parse.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    assert jax.device_count() == 8, "the tests need 8 fake CPU devices"

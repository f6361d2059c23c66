"""Initial weights, drawn by NumPy on the host.

JAX's own initialisers compile one program for each shape, and GoogLeNet has a hundred
shapes: 20 s on a CPU before anything runs. Drawn on the host, a model is made in two
seconds. Traced (`jax.jit`, `jax.eval_shape`, `jax.vmap`), the functions give the same
values for the same key.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# Standard deviation of the standard normal distribution cut off at -2 and 2.
_TRUNCATED_STD = 0.87962566103423978


def he_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal, cut off at two deviations, variance 2 / fan_in (He et al., 2015).

    Args:
      key: random key.
      shape: `[..., in, out]`.
      dtype: floating point.
    """
    scale = math.sqrt(2.0 / math.prod(shape[:-1])) / _TRUNCATED_STD
    return _on_host(partial(_truncated, shape, scale), key, shape, dtype)


def small_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal of scale 0.02, cut off at two: tokens and positions of transformers.

    Args:
      key: random key.
      shape: any.
      dtype: floating point.
    """
    return _on_host(partial(_truncated, shape, 0.02), key, shape, dtype)


def _truncated(
    shape: tuple[int, ...], scale: float, rng: np.random.Generator
) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    while (far := np.abs(values) > 2.0).any():
        values[far] = rng.standard_normal(int(far.sum()), np.float32)
    return values * np.float32(scale)


def small_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform with variance 1 / (3 fan_in), PyTorch's default for convolutions.

    Behind batch norm the scale of a kernel changes nothing but how far a step of the
    optimiser turns it: from these smaller kernels training starts faster.

    Args:
      key: random key.
      shape: `[..., in, out]`.
      dtype: floating point.
    """
    return _uniform(math.sqrt(1.0 / math.prod(shape[:-1])), key, shape, dtype)


def glorot_uniform(
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    layers: int = 1,
    spread: float = 1.0,
) -> jax.Array:
    """Uniform with variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010).

    Args:
      key: random key.
      shape: `[..., in, out]`.
      dtype: floating point.
      layers: how many layers of equal size have their outputs side by side in `out`;
        fan_out is that of one.
      spread: factor on all values; 1 is Glorot's.
    """
    window = math.prod(shape[:-2])
    limit = spread * math.sqrt(6.0 / (window * (shape[-2] + shape[-1] // layers)))
    return _uniform(limit, key, shape, dtype)


def _uniform(
    limit: float, key: jax.Array, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    def draw(rng: np.random.Generator) -> np.ndarray:
        return np.float32(limit) * (2.0 * rng.random(shape, np.float32) - 1.0)

    return _on_host(draw, key, shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros of any shape; the key is not used."""
    del key
    return jnp.asarray(np.zeros(shape, dtype))


def _on_host(
    draw: Callable[[np.random.Generator], np.ndarray],
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    def values(words: jax.Array) -> np.ndarray:
        seeds = np.asarray(words)
        # Under vmap there is one key, and one array, for each entry of leading axes.
        rows = seeds.reshape(-1, seeds.shape[-1])
        arrays = np.stack([draw(np.random.default_rng(row)) for row in rows])
        return arrays.reshape(*seeds.shape[:-1], *shape).astype(dtype)

    words = jax.random.key_data(key)
    if not isinstance(words, Tracer):
        return jnp.asarray(values(words))
    result = jax.ShapeDtypeStruct(shape, dtype)
    return jax.pure_callback(values, result, words, vmap_method="broadcast_all")

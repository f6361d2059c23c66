"""Sums of exponentials that do not overflow."""

import jax
import jax.numpy as jnp


def log_one_plus_sum(exponents: jax.Array, where: jax.Array, axis: int) -> jax.Array:
    """`log(1 + sum of exp(exponents))` over an axis, of those that `where` keeps.

    Args:
      exponents: floating point.
      where: bool, of as many axes.
      axis: the one that is summed, and gone.
    """
    kept = jnp.where(where, exponents, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(kept, axis, initial=0.0, keepdims=True))
    total = jnp.sum(jnp.exp(kept - largest), axis, keepdims=True) + jnp.exp(-largest)
    return jnp.squeeze(jnp.log(total) + largest, axis)

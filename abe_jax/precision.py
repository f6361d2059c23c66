"""Which floating-point type a computation is done in."""

import jax
import jax.numpy as jnp


def working_dtype() -> jnp.dtype:
    """float32; float64 where JAX's `jax_enable_x64` is on."""
    return jnp.result_type(float)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Widens bfloat16 and float16 to float32; leaves wider types as they are."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x

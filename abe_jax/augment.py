"""Random crops, flips and colours, on the device, inside the step.

Every draw depends on (seed, step, position in the global batch) only, so that the same
run gives the same images on any number of devices. Values are 0 to 255 throughout.
"""

import jax
import jax.numpy as jnp

# RGB to luma and two chroma axes (NTSC); hue is the angle in the chroma plane.
_TO_YIQ = jnp.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
)

"""The convolution of all trunks, and of attention's last layer."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from abe_jax.models import initializers, lowering


def convolution(
    in_channels: int,
    channels: int,
    kernel: int,
    stride: int = 1,
    *,
    use_bias: bool = True,
    kernel_init: Callable[..., Any],
    dtype: DTypeLike | None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution `[..., h, w, in_channels]` to `[..., h', w', channels]`.

    Half the kernel is padded on each side: with stride 1 maps keep their size. CPUs
    compute it in their own way; biases start at 0.
    """
    pad = kernel // 2
    return nnx.Conv(
        in_channels,
        channels,
        (kernel, kernel),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=initializers.zeros,
        conv_general_dilated=lowering.conv_general_dilated,
        dtype=dtype,
        rngs=rngs,
    )

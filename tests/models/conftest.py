"""Peers whose compiled parts may be missing, and the smallest model of a trunk."""

import pytest

from abe_jax import models
from abe_jax.models.shapes import without_values


def one_head(trunk):
    """A 1-head on a trunk, without values."""
    return without_values(
        lambda rngs: models.OneHead(embedding_dim=8, trunk=trunk, rngs=rngs)
    )


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, also where it was made for another PyTorch."""
    torch = pytest.importorskip("torch")
    # torchvision is made for a PyTorch with CUDA. On another one its compiled part does
    # not load; declaring the two operators that its Python part describes is enough.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        except RuntimeError:
            pass  # declared already: the compiled part is there
    return pytest.importorskip("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision):
    """timm, which imports torchvision."""
    return pytest.importorskip("timm")

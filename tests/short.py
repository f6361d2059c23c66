"""Trunks with each kind of layer, and a third of what there is to compile.

As a config file it is the quickstart's, and the process that reads it has these trunks.
"""

from abe_jax.models import googlenet, resnet, vit
from abe_jax.models.trunks import TRUNKS
from configs import quickstart


class Short(googlenet.GoogLeNetForm):
    """Three inception blocks in place of nine."""

    @property
    def stages(self):
        blocks = ("3a", "pool3", "4a", "pool4", "5a")
        return ("conv1", "conv2", "pool2", *blocks, "average")


SHORT = {
    name: Short(**vars(form) | {"name": name})
    for form in (googlenet.BVLC, googlenet.TORCHVISION)
    for name in [form.name.replace("googlenet", "short")]
}


def shorten(patch):
    """Has the trunks of a few blocks in place of all, under their own names."""
    for form in (googlenet.BVLC, googlenet.TORCHVISION):
        patch.setitem(TRUNKS, form.name, Short(**vars(form)))
    blocks = {"layer3": 2}
    layers = {k: (blocks.get(k, 1), width) for k, (_, width) in resnet._LAYERS.items()}
    patch.setattr(resnet, "_LAYERS", layers)
    patch.setattr(vit, "_BLOCKS", ("block5", "block6", "block7", "block12"))


def get_config():
    TRUNKS.update(SHORT)
    return quickstart.get_config()

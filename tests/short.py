"""GoogLeNet with each kind of layer, and a third of what there is to compile.

As a config file it is the quickstart's, and the process that reads it has these trunks.
"""

from abe_jax.models import googlenet
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


def get_config():
    TRUNKS.update(SHORT)
    return quickstart.get_config()

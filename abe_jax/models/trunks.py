"""The trunks by their names. A new one is a file of its own and a line here."""

from abe_jax.errors import require_known
from abe_jax.models import googlenet, resnet, vit
from abe_jax.models.trunk import Trunk

TRUNKS: dict[str, Trunk] = {
    trunk.name: trunk
    for trunk in (
        *(googlenet.BVLC, googlenet.TORCHVISION),
        resnet.RESNET50,
        *vit.FORMS,
    )
}


def trunk_of(trunk: str | Trunk) -> Trunk:
    """The trunk itself, or the one of that name, at its published width.

    Raises:
      UserError: there is none of that name.
    """
    if isinstance(trunk, Trunk):
        return trunk
    require_known("model.trunk", trunk, TRUNKS)
    return TRUNKS[trunk]

"""Pictures of masks, and which parts of an object they are at."""

import dataclasses

import numpy as np

from abe_jax import data
from abe_jax.data.datasets.bird_drawing import PART_NAMES
from abe_jax.data.datasets.birds import Birds
from abe_jax.data.datasets.tree import printable
from abe_jax.data.memory import InMemory
from abe_jax.report import page


@dataclasses.dataclass(frozen=True)
class Row:
    """One image and its masks.

    Attributes:
      image: of the picture, as a data URL.
      name: of the image.
      masks: a picture a learner; what it shows, in words.
    """

    image: str
    name: str
    masks: list[tuple[str, str]]


def means(
    images: data.Subset,
    masks: np.ndarray,
    size: int,
    pictures: page.Pictures,
    count: int,
) -> list[Row]:
    """The masks of some images, averaged over their channels.

    Each image's least and most attended place, over all learners, are dark and yellow.

    Args:
      images: that have masks.
      masks: theirs, `[n, M, h, w, C]`.
      size: of the middle that the model sees, pixels.
      pictures: of the page.
      count: how many images are shown, spread evenly.
    """
    names, kind = images.names, "mean over the channels"
    return [
        _row(images[i], names[i], size, masks[i].mean(axis=-1), pictures, kind)
        for i in data.evenly(len(images), count)
    ]


def channels(
    images: data.Subset,
    masks: np.ndarray,
    size: int,
    pictures: page.Pictures,
    count: int,
) -> list[tuple[int, Row]]:
    """The channels in which the learners differ most, over one image in the middle.

    Args are those of `means`; `count` is the number of channels.

    Returns:
      number of the channel, and its masks.
    """
    spread = masks.std(axis=1).mean(axis=(0, 1, 2))
    middle = len(images) // 2
    image, name, maps = images[middle], images.names[middle], masks[middle]
    return [
        (c, _row(image, name, size, maps[..., c], pictures, f"channel {c}"))
        for c in np.argsort(-spread)[:count].tolist()
    ]


def parts(
    images: data.Subset, masks: np.ndarray, size: int
) -> tuple[list[str], np.ndarray] | None:
    """How strongly each learner attends to each part of the object.

    Args:
      images: that have masks; None is returned unless they are birds, whose parts are
        known.
      masks: theirs, `[n, M, h, w, C]`.
      size: of the middle that the model sees, pixels.

    Returns:
      names of the parts, and `[M, parts]`: the mean of a learner's mask over the part
      divided by its mean over the image, both over all channels and images; 1 is no
      preference.
    """
    source = images.source
    source = source.source if isinstance(source, InMemory) else source
    if not isinstance(source, Birds):
        return None
    maps = masks.mean(axis=-1)  # [n, M, h, w]
    maps = maps / maps.mean(axis=(2, 3), keepdims=True)
    height, width = maps.shape[2:]
    inside, area = np.zeros((maps.shape[1], len(PART_NAMES))), np.zeros(len(PART_NAMES))
    for position, index in enumerate(images.indices):
        where = _middle(source.part_masks(int(index)), size)  # [parts, H, W]
        rows = (np.arange(height * 8) * where.shape[1]) // (height * 8)
        columns = (np.arange(width * 8) * where.shape[2]) // (width * 8)
        fine = where[:, rows][:, :, columns].astype(np.float64)
        share = fine.reshape(len(PART_NAMES), height, 8, width, 8).mean(axis=(2, 4))
        inside += np.einsum("mhw,phw->mp", maps[position], share)
        area += share.sum(axis=(1, 2))
    return list(PART_NAMES), inside / np.maximum(area, 1e-9)


def _row(
    image: np.ndarray,
    name: str,
    size: int,
    maps: np.ndarray,
    pictures: page.Pictures,
    kind: str,
) -> Row:
    import matplotlib  # as in `plots`

    low, high = float(maps.min()), float(maps.max())
    shades = (maps - low) / max(high - low, 1e-9)
    colours = matplotlib.colormaps["viridis"](shades)[..., :3]
    return Row(
        image=pictures.url(_middle(image.transpose(2, 0, 1), size).transpose(1, 2, 0)),
        name=printable(name),
        masks=[
            (
                pictures.url((255 * picture).astype(np.uint8), exact=True),
                f"mask of learner {m}, {kind}: {level.min():.2f} to {level.max():.2f}",
            )
            for m, (picture, level) in enumerate(zip(colours, maps, strict=True))
        ],
    )


def _middle(images: np.ndarray, size: int) -> np.ndarray:
    """The middle `[..., size, size]`, as `augment.centre_crop` takes it."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]

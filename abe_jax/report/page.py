"""Pages of one file each: templates, small pictures, no network."""

import base64
import dataclasses
import functools
import io
import pathlib

import jinja2
import numpy as np
from PIL import Image

import abe_jax
from abe_jax.workdir import write_whole

# Of all pictures of a page together; the rest of it is small.
PICTURE_BYTES = 7 * 2**20

_SIDE = 128  # pixels of a picture at most


@dataclasses.dataclass(frozen=True)
class Shot:
    """A picture of a gallery.

    Attributes:
      url: of the picture, as data; empty where there is none.
      alt: what it shows, for those who do not see it.
      caption: under it.
      name: of the image.
      kind: of a match: "right", "wrong" or "found".
      mark: a sign of right or wrong that needs no colour.
    """

    url: str
    alt: str
    caption: str
    name: str
    kind: str = "found"
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Query:
    """A row of a gallery: an image and what it finds."""

    heading: str
    asked: Shot
    found: list[Shot]


class Pictures:
    """Makes the pictures of one page, and knows when they are too much."""

    def __init__(self, limit: int = PICTURE_BYTES):
        self._left = limit

    @property
    def full(self) -> bool:
        """Whether the page has as many as it should."""
        return self._left <= 0

    def url(self, pixels: np.ndarray, *, exact: bool = False) -> str:
        """A picture as a data URL.

        Args:
          pixels: uint8 `[H, W, 3]` or `[H, W]`.
          exact: keep every pixel, as for a mask.
        """
        image = Image.fromarray(pixels)
        image.thumbnail((_SIDE, _SIDE))
        buffer = io.BytesIO()
        kind = "png" if exact else "jpeg"
        image.save(buffer, kind, quality=82)
        data = base64.b64encode(buffer.getvalue()).decode()
        self._left -= len(data)
        return f"data:image/{kind};base64,{data}"


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("abe_jax.report"),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def write(path: pathlib.Path, template: str, **content: object) -> None:
    """Fills a template and writes the page, whole or not at all.

    Args:
      path: of the page.
      template: file in `templates/`.
      **content: its variables; text of any kind, which is escaped.

    Raises:
      NotWritable: such as on a full disk.
    """
    filled = (
        _templates()
        .get_template(template)
        .render(version=abe_jax.__version__, **content)
    )
    # Names may hold bytes that are no UTF-8.
    write_whole(path, filled.encode("utf-8", "backslashreplace").decode())

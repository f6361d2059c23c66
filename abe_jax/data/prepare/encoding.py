"""Image files of any kind to the JPEG files that prepared data sets hold."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import process as process_pool

from PIL import Image

from abe_jax.data import workers
from abe_jax.data.datasets.listing import Box, Record
from abe_jax.data.decoding import FORMATS, RelativeBox, orientation, reason, to_rgb
from abe_jax.errors import UserError

# Pillow's own bound, above which it refuses a file as a decompression bomb.
MAX_PIXELS = 178_956_970
MAX_SIDE = 65_500  # pixels, as stored; libjpeg's bound
MIN_SIDE = 4  # pixels; a smaller one shows nothing, it is a placeholder
WHOLE: RelativeBox = (0.0, 0.0, 1.0, 1.0)
_CHUNK = 16  # files that a process gets at a time


@dataclasses.dataclass(frozen=True)
class Storing:
    """How images are stored.

    Attributes:
      size: what a longer short side is reduced to, pixels.
      keep_original: whether images keep their size, and upright RGB JPEG files their
        bytes.
      quality: of the JPEG encoder, 1 to 100.
    """

    size: int = 256
    keep_original: bool = False
    quality: int = 95


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An image as it is stored.

    Attributes:
      jpeg: contents of a JPEG file.
      box: of the object; the whole image where the data set has none; None where it
        has one that lies outside of the image, or the image is turned by its EXIF tag.
      digest: of the file it came from, 16 bytes.
    """

    jpeg: bytes
    box: RelativeBox | None
    digest: bytes


class BadImage(Exception):
    """A file that is no usable image; the text says why."""


def encode(data: bytes, storing: Storing, box: Box | None = None) -> Encoded:
    """Makes the stored form of an image.

    The content decides what a file is, not the suffix of its name. Orientation is that
    of the EXIF tag, transparency is laid over white, every colour mode becomes RGB. An
    upright RGB JPEG file that is no larger than wanted keeps its bytes.

    Args:
      data: contents of an image file.
      storing: how to store it.
      box: of the object, pixels of the image as it is in the file.

    Raises:
      BadImage: empty, cut short, no image, too large, or too small.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size)
            relative = _relative(box, image.size)
            # MPO, of many telephones, is JPEG with more pictures after the first.
            plain = image.format in ("JPEG", "MPO") and image.mode == "RGB"
            wanted = min(image.size) if storing.keep_original else storing.size
            if min(image.size) > 4 * wanted:
                # JPEG decodes at a fraction of its size; the rest is left to resizing.
                image.draft("RGB", (2 * wanted, 2 * wanted))
            # Pillow turns TIFF files when it loads them; PNG files may have the tag
            # behind the pixels.
            upright = orientation(image) == 1
            image.load()
            upright = upright and orientation(image) == 1
            if plain and upright and min(image.size) <= wanted:
                return Encoded(data, relative, _digest(data))
            rgb = to_rgb(image)
        if box is not None and not upright:
            relative = None  # nobody knows whether it is of the image before or after
        if min(rgb.size) > wanted:
            scale = wanted / min(rgb.size)
            width, height = (max(wanted, round(side * scale)) for side in rgb.size)
            bicubic = Image.Resampling.BICUBIC
            rgb = rgb.resize((width, height), bicubic, reducing_gap=3.0)
        if max(rgb.size) > MAX_SIDE:
            raise BadImage(
                f"a side of {max(rgb.size):,} pixels as it would be stored; JPEG "
                f"allows {MAX_SIDE:,}"
            )
        buffer = io.BytesIO()
        rgb.save(buffer, "JPEG", quality=storing.quality)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # what Pillow's readers raise has no common name
        raise BadImage(reason(error)) from error
    return Encoded(buffer.getvalue(), relative, _digest(data))


def encode_file(record: Record, storing: Storing) -> Encoded | str:
    """The stored form of a file, or why there is none."""
    try:
        with open(record.path, "rb") as file:
            data = file.read()
        return encode(data, storing, record.box)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def encode_files(
    records: Sequence[Record], storing: Storing, num_processes: int
) -> Generator[Encoded | str]:
    """`encode_file` of every record, in their order, on several processes.

    Only a few chunks of files are under way at a time, so that memory is bounded. Close
    the generator if you stop early: the garbage collector might close it in one of the
    pool's own threads, which would wait for itself.

    Raises:
      UserError: a process was killed, as happens where memory runs out.
    """
    chunks = [records[i : i + _CHUNK] for i in range(0, len(records), _CHUNK)]
    if num_processes < 2 or len(records) < 4 * _CHUNK:
        for chunk in chunks:
            yield from _encode_chunk(chunk, storing)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        num_processes,
        # A fork would copy the locks of threads that run here.
        multiprocessing.get_context("spawn"),
        initializer=workers.follow_main_process,
    )
    waiting = collections.deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, chunk, storing))
            if len(waiting) > 4 * num_processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except process_pool.BrokenProcessPool as error:
        raise UserError(
            "a process that encodes images was killed, most likely for want of "
            "memory; run again with fewer of them: --num_processes=1."
        ) from error
    finally:
        # RuntimeError: interrupted while the pool was being started.
        with contextlib.suppress(RuntimeError):
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_chunk(records: Sequence[Record], storing: Storing) -> list[Encoded | str]:
    with warnings.catch_warnings():
        # Pillow warns at half of the bound; here the bound alone counts.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # Damaged EXIF or TIFF tags do not make an image unusable.
        warnings.simplefilter("ignore", UserWarning)
        return [encode_file(record, storing) for record in records]


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"{width:,} x {height:,} pixels, more than {MAX_PIXELS:,} in all"
        )
    if min(size) < MIN_SIDE:
        raise BadImage(f"{width:,} x {height:,} pixels, less than {MIN_SIDE} on a side")


def _relative(box: Box | None, size: tuple[int, int]) -> RelativeBox | None:
    """A box in pixels as shares of the image, cut off at its edges; see `Encoded`."""
    if box is None:
        return WHOLE
    width, height = size
    left, right = (min(max(x / width, 0.0), 1.0) for x in (box[0], box[2]))
    top, bottom = (min(max(y / height, 0.0), 1.0) for y in (box[1], box[3]))
    if (right - left) * width < 1.0 or (bottom - top) * height < 1.0:
        return None
    return top, left, bottom, right


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()

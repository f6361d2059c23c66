"""Contents of image files to RGB squares of one size, on the host."""

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from abe_jax.errors import UserError, require_known

# The only formats that are read, whatever a file's name. Pillow knows more, but its EPS
# reader would start another program, and others are for rare and unsafe formats.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000"),
    "AVIF",
)
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp"),
    *(".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k"),
    *(".jpx", ".avif"),
)

# Above this a file in a zip file is no photograph but a trap.
MAX_BYTES = 512 * 2**20

SQUARES = ("centre", "squeeze", "pad")

# Colour of the padding (ours; the paper does not give one): the RGB means that the
# paper's trunk subtracts, so that it sees zeros there, as in its own padding.
PADDING = (123, 117, 104)

# What undoes an EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Top, left, bottom, right as shares of height and width, 0 to 1.
RelativeBox = tuple[float, float, float, float]


def decode(
    data: bytes,
    size: int,
    name: str,
    *,
    square: str = "centre",
    box: RelativeBox | None = None,
) -> np.ndarray:
    """Decodes an image to an RGB square.

    Of several frames the first is taken. Orientation is that of the EXIF tag, where it
    can be read; transparency is laid over white, 16-bit grey is scaled to 8 bits, grey,
    palette and CMYK become RGB.

    Args:
      data: contents of an image file.
      size: side of the result, pixels.
      name: what an error message calls the image.
      square: "centre": the short side becomes `size`, unless it is already, and the
        middle is kept; "squeeze": both sides become `size`; "pad": the long side
        becomes `size`, and what the short one lacks is `PADDING`, half on either side.
      box: part of the image to take.

    Returns:
      uint8 `[size, size, 3]`.

    Raises:
      UserError: the data is no image of `FORMATS`, is cut short, is larger than
        Pillow's bound, or has pixels of an unknown range: of more than 16 bits.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if box is None:
                # JPEG decodes at a fraction of the size.
                image.draft("RGB", (size, size))
            image.load()
            rgb = to_rgb(image)
    except Exception as error:  # what Pillow's readers raise has no common name
        raise UserError(f"cannot read {name} as an image: {reason(error)}.") from error
    if box is not None:
        rgb = rgb.crop(_pixels(box, rgb.size))
    return to_square(rgb, size, square)


def to_square(rgb: Image.Image, size: int, square: str) -> np.ndarray:
    """An RGB image as `decode` leaves it: uint8 `[size, size, 3]`."""
    width, height = rgb.size
    if (width, height) == (size, size):
        return np.asarray(rgb)
    if square == "centre":
        if min(width, height) == size:
            left, top = (width - size) // 2, (height - size) // 2
            return np.asarray(rgb.crop((left, top, left + size, top + size)))
        return np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC))
    if square == "pad":
        return np.asarray(_padded(rgb, size))
    return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC))


def decode_stored(
    data: bytes, size: int, name: str, *, square: str = "centre"
) -> np.ndarray:
    """Decodes a file that `abe_jax.prepare` stored for squares of the size.

    Such a file is an upright RGB JPEG with a short side of `size`, or less where the
    image was smaller. The pixels are those of `decode`, in half the time and without
    holding the GIL: libjpeg-turbo writes straight into the array. A file that it
    reports any error or warning about is left to `decode`.

    Args:
      data: contents of the file.
      size: side of the result, pixels.
      name: what an error message calls the image.
      square: see `decode`.

    Returns:
      uint8 `[size, size, 3]`, perhaps a view of the whole image.

    Raises:
      UserError: see `decode`.
    """
    try:
        image = simplejpeg.decode_jpeg(data)
    except ValueError:  # extraneous bytes, for one, which do no harm
        return decode(data, size, name, square=square)
    height, width, _ = image.shape
    if square != "centre" or min(height, width) != size:
        return to_square(Image.fromarray(image), size, square)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def require_known_square(square: str) -> str:
    """The argument, if it is one that `decode` knows.

    Raises:
      UserError: it is not.
    """
    require_known("data.square", square, SQUARES)
    return square


def to_rgb(image: Image.Image) -> Image.Image:
    """The image the right way up, as 8-bit RGB over white."""
    file_format, turn = image.format, _TURNS.get(orientation(image))
    image = image if turn is None else image.transpose(turn)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)
        # 16-bit files arrive as "I;16" or "I"; their range is 0 to 65,535. As "I" a
        # TIFF file has 32 bits, of any range.
        unknown = image.mode == "F" or (image.mode, file_format) == ("I", "TIFF")
        if unknown or values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are not of 8 or 16 bits")
        return Image.fromarray(
            np.clip(values / 257.0, 0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", rgba.size, "white"), rgba
        ).convert("RGB")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """That of the EXIF tag, 1 to 8; 1, upright, where it has none that can be read."""
    try:
        tag = image.getexif().get(0x0112)
        return int(tag) if tag in _TURNS else 1
    except Exception:  # damage in the metadata must not hurt the pixels
        return 1


def reason(error: Exception) -> str:
    """Why a file cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):  # its text has the buffer's address
        return "not an image of a known format"
    return " ".join(str(error).split()) or type(error).__name__


def _padded(rgb: Image.Image, size: int) -> Image.Image:
    scale = size / max(rgb.size)
    width, height = (max(1, round(side * scale)) for side in rgb.size)
    square = Image.new("RGB", (size, size), PADDING)
    inner = rgb.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(inner, ((size - width) // 2, (size - height) // 2))
    return square


def _pixels(box: RelativeBox, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in whole pixels, at least one each way."""
    width, height = size
    top, left, bottom, right = box
    x0, y0 = min(int(left * width), width - 1), min(int(top * height), height - 1)
    x1 = min(max(round(right * width), x0 + 1), width)
    y1 = min(max(round(bottom * height), y0 + 1), height)
    return x0, y0, x1, y1

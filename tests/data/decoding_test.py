"""Contents of image files of every kind to RGB squares."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from abe_jax.data.decoding import PADDING, decode, decode_stored
from abe_jax.data.prepare.encoding import Storing, encode
from abe_jax.errors import UserError

RED = (200, 30, 40)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def assert_close(image, colour, tolerance=4):
    assert image.dtype == np.uint8 and image.shape[-1] == 3
    assert np.abs(image.reshape(-1, 3).mean(0) - colour).max() <= tolerance


@pytest.mark.parametrize(
    ("image", "options", "colour"),
    [
        (Image.new("RGB", (9, 9), RED), {}, RED),
        (Image.new("RGB", (9, 9), RED), {"format": "JPEG", "quality": 95}, RED),
        (Image.new("RGB", (9, 9), RED), {"format": "WEBP", "quality": 95}, RED),
        (Image.new("L", (9, 9), 90), {}, (90, 90, 90)),
        (Image.new("L", (9, 9), 90), {"format": "JPEG"}, (90, 90, 90)),
        (Image.new("1", (9, 9), 1), {}, (255, 255, 255)),
        (Image.new("RGB", (9, 9), RED).quantize(4), {}, RED),
        (Image.new("RGBA", (9, 9), (*RED, 255)), {}, RED),
        (Image.new("RGBA", (9, 9), (*RED, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 128)), {}, (127, 127, 127)),
        (Image.new("LA", (9, 9), (90, 0)), {}, (255, 255, 255)),
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), {"format": "JPEG"}, (254, 0, 0)),
        (
            Image.fromarray(np.full((9, 9), 90 * 257, np.uint16)),
            {},
            (90, 90, 90),
        ),
        (
            Image.fromarray(np.full((9, 9), 90 * 257, np.uint16)),
            {"format": "PPM"},
            (90, 90, 90),
        ),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_becomes_rgb(image, options, colour):
    pixels = decode(encoded(image, **options), 9, "it")
    assert_close(pixels, colour)


@pytest.mark.parametrize(
    "pixels",
    [np.float32(0.5), np.float32(200), *map(np.int32, (70_000, -1, 128))],
)
def test_pixels_of_an_unknown_range_are_refused(pixels):
    image = Image.fromarray(np.full((9, 9), pixels))
    with pytest.raises(UserError, match="cannot read it .* not of 8 or 16 bits"):
        decode(encoded(image, "TIFF"), 9, "it")


def test_transparent_palette_lies_over_white():
    image = Image.new("P", (9, 9), 0)
    image.putpalette([*RED, 0, 0, 0])
    assert_close(decode(encoded(image, transparency=0), 9, "it"), (255, 255, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = Image.new("RGB", (16, 16), "black")
    upright.paste(RED, (0, 0, 8, 8))  # upper left, seen the right way up
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(stored, "PNG", exif=exif), 16, "it")
    assert_close(pixels[1:7, 1:7], RED)
    assert_close(pixels[9:, 9:], (0, 0, 0))


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (1, 1), (3, 1000), (500, 2)])
def test_square_is_the_middle(size):
    image = Image.new("RGB", size, RED)
    assert_close(decode(encoded(image), 16, "it"), RED)
    assert decode(encoded(image), 16, "it").shape == (16, 16, 3)


def test_middle_not_side_is_kept():
    image = Image.new("RGB", (60, 20), "black")
    image.paste(RED, (20, 0, 40, 20))
    assert_close(decode(encoded(image), 20, "it"), RED)


def test_squeeze_keeps_all_and_loses_the_aspect():
    image = Image.new("RGB", (60, 20), "black")
    image.paste(RED, (20, 0, 40, 20))
    pixels = decode(encoded(image), 18, "it", square="squeeze")
    assert_close(pixels[:, 7:11], RED)
    assert_close(pixels[:, :5], (0, 0, 0))
    assert_close(pixels[:, 13:], (0, 0, 0))


@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (33, 32), (500, 2), (7, 7)])
@pytest.mark.parametrize("size", [16, 33])
def test_pad_is_the_resized_image_in_a_frame_of_the_means(shape, size):
    width, height = shape
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    long = max(shape)
    inner = [max(1, round(side * size / long)) for side in shape]
    expected = np.empty((size, size, 3), np.uint8)
    expected[:] = PADDING
    left, top = ((size - side) // 2 for side in inner)
    expected[top : top + inner[1], left : left + inner[0]] = image.resize(
        (inner[0], inner[1]), Image.Resampling.BICUBIC
    )
    pixels = decode(encoded(image), size, "it", square="pad")
    np.testing.assert_array_equal(pixels, expected)


def test_a_padded_jpeg_may_be_decoded_at_a_fraction():
    image = Image.new("RGB", (1600, 400), RED)
    pixels = decode(encoded(image, "JPEG", quality=95), 64, "it", square="pad")
    assert_close(pixels[24:40], RED)
    np.testing.assert_array_equal(pixels[:24], np.full((24, 64, 3), PADDING))
    np.testing.assert_array_equal(pixels[40:], np.full((24, 64, 3), PADDING))


def test_the_padding_is_nothing_once_the_means_are_subtracted():
    """Those of the paper's trunk are BGR."""
    assert PADDING[::-1] == (104, 117, 123)


def test_box_is_taken_before_the_square():
    image = Image.new("RGB", (60, 20), "black")
    image.paste(RED, (0, 10, 10, 20))
    box = (0.5, 0.0, 1.0, 1 / 6)
    assert_close(decode(encoded(image), 10, "it", box=box), RED)
    whole = (0.0, 0.0, 1.0, 1.0)
    np.testing.assert_array_equal(
        decode(encoded(image), 20, "it", box=whole), decode(encoded(image), 20, "it")
    )


def test_short_side_of_the_size_is_only_cut():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 31, 3), np.uint8)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(pixels)), 12, "it"), pixels[:, 9:21]
    )


def test_same_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(pixels)), 12, "it"), pixels
    )


def _jpeg_with_exif(image, tiff):
    """A JPEG file whose EXIF block is given."""
    plain = encoded(image, "JPEG", quality=95)
    block = b"Exif\0\0" + tiff
    return (
        plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]
    )


def _tiff(*tags, rest=b""):
    """An EXIF block: (tag, type, count, value as it is stored) each."""
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    body = b"".join(struct.pack("<HHI4s", *tag) for tag in tags)
    return head + body + struct.pack("<I", 0) + rest


def _at(offset):
    return struct.pack("<I", offset)


# What cameras and programs leave behind: the orientation is sound, tags beside it not.
_TURNED = (0x0112, 3, 1, struct.pack("<I", 3))
DAMAGED_EXIF = {
    "negative rational in an unsigned tag": _tiff(
        _TURNED, (0x011A, 10, 1, _at(38)), rest=struct.pack("<ii", -72, 1)
    ),
    "text stored as a rational": _tiff(
        (0x010F, 5, 1, _at(38)), _TURNED, rest=struct.pack("<II", 1, 2)
    ),
    "number stored as text": _tiff(_TURNED, (0x0128, 2, 4, b"abc\0")),
    "pointer stored as text": _tiff(_TURNED, (0x8769, 2, 4, b"abc\0")),
    "pointer beyond the end": _tiff(_TURNED, (0x8825, 4, 1, _at(4_000_000))),
    "resolution stored as text": _tiff(_TURNED, (0x011A, 2, 4, b"abc\0")),
    "no orientation": _tiff((0x0112, 2, 4, b"abc\0")),
    "orientation 77": _tiff((0x0112, 3, 1, struct.pack("<I", 77))),
    "cut short": _tiff(_TURNED)[:15],
    "no block": b"nothing of the kind",
    "empty": b"",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", DAMAGED_EXIF)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_does_not_hurt_pixels(kind, format):
    exif = DAMAGED_EXIF[kind]
    half = Image.new("RGB", (16, 16), RED)
    half.paste((0, 0, 0), (0, 8, 16, 16))
    if format == "JPEG":
        content = _jpeg_with_exif(half, exif)
    else:
        content = encoded(half, format, exif=b"Exif\0\0" + exif)
    pixels = decode(content, 16, "it")
    stored = encode(content, Storing(quality=100)).jpeg
    turned = exif.find(struct.pack("<HHI4s", *_TURNED)) >= 0 and kind != "cut short"
    top = slice(9, None) if turned else slice(0, 7)
    for found in (pixels, decode_stored(stored, 16, "it")):
        assert_close(found[top], RED, tolerance=9)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_image_is_named(content):
    with pytest.raises(UserError, match="cannot read ash/1.png as an image") as caught:
        decode(content, 8, "ash/1.png")
    assert "BytesIO" not in str(caught.value)


def test_truncated_image_is_named():
    pixels = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)
    content = encoded(Image.fromarray(pixels), "JPEG")
    with pytest.raises(UserError, match="cannot read it as an image"):
        decode(content[: len(content) // 2], 8, "it")


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="cannot read it as an image"):
        decode(encoded(Image.new("RGB", (99, 99))), 8, "it")


def test_formats_that_start_other_programs_are_no_images(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with pytest.raises(UserError, match="not an image of a known format"):
        decode(postscript, 8, "it")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_decoders_take_a_file_with_extraneous_bytes():
    """As every viewer does: what `prepare` stores, training reads."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    plain = encoded(Image.fromarray(noise), "JPEG", quality=95)
    end = plain.rindex(b"\xff\xd9")
    content = plain[:end] + bytes(7) + plain[end:]
    expected = decode(plain, 24, "it")
    np.testing.assert_array_equal(decode(content, 24, "it"), expected)
    stored = encode(content, Storing()).jpeg
    np.testing.assert_array_equal(decode_stored(stored, 24, "it"), expected)

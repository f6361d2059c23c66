"""Every kind of image file becomes a stored JPEG, or is refused with a reason."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from abe_jax.data.datasets.listing import Record
from abe_jax.data.decoding import decode, decode_stored
from abe_jax.data.prepare.encoding import Storing, encode, encode_files

RED = (200, 30, 40)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(stored):
    with Image.open(io.BytesIO(stored.jpeg)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        return np.asarray(image)


def png_of_size(width, height):
    """The beginning of a PNG file that says how large it is; no pixels follow."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4)


def jpeg_of_size(width, height):
    """A JPEG file whose header lies about its size."""
    data = bytearray(encoded(Image.new("RGB", (64, 64), RED), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    ("image", "options", "colour"),
    [
        (Image.new("L", (40, 30), 90), {}, (90, 90, 90)),
        (Image.new("L", (40, 30), 90), {"format": "JPEG"}, (90, 90, 90)),
        (Image.fromarray(np.full((30, 40), 90 * 257, np.uint16)), {}, (90, 90, 90)),
        (
            Image.new("CMYK", (40, 30), (0, 255, 255, 0)),
            {"format": "JPEG"},
            (254, 0, 0),
        ),
        (Image.new("RGBA", (40, 30), (*RED, 0)), {}, (255, 255, 255)),
        (Image.new("RGB", (40, 30), RED).quantize(4), {}, RED),
        (Image.new("RGB", (40, 30), RED), {"format": "WEBP", "quality": 95}, RED),
        (Image.new("RGB", (40, 30), RED), {"format": "BMP"}, RED),
        (Image.new("RGB", (40, 30), RED), {"format": "TIFF"}, RED),
        (Image.new("RGB", (40, 30), RED), {"format": "GIF"}, RED),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_all_modes_and_formats_become_rgb_jpeg(image, options, colour):
    stored = pixels(encode(encoded(image, **options), Storing()))
    assert stored.shape == (30, 40, 3)
    assert np.abs(stored.reshape(-1, 3).mean(0) - colour).max() <= 4


def test_an_rgb_jpeg_that_is_small_enough_keeps_its_bytes():
    data = encoded(Image.new("RGB", (300, 256), RED), "JPEG", quality=50)
    assert encode(data, Storing()).jpeg == data
    assert encode(data, Storing(size=255)).jpeg != data


@pytest.mark.parametrize(
    ("size", "stored"),
    [((512, 400), (328, 256)), ((400, 512), (256, 328)), ((2560, 256), (2560, 256))],
)
def test_short_side_is_reduced_and_never_enlarged(size, stored):
    image = Image.new("RGB", size, RED)
    assert pixels(encode(encoded(image), Storing())).shape[1::-1] == stored
    assert pixels(encode(encoded(image, "JPEG"), Storing())).shape[1::-1] == stored
    small = Image.new("RGB", (30, 20), RED)
    assert pixels(encode(encoded(small), Storing())).shape == (20, 30, 3)


def test_a_large_jpeg_looks_like_one_that_was_reduced_at_once():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (9, 12, 3), np.uint8)
    large = Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC)
    wanted = np.asarray(large.resize((85, 64), Image.Resampling.BICUBIC), float)
    found = pixels(encode(encoded(large, "JPEG", quality=95), Storing(size=64)))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).mean() < 3


def test_keep_original():
    storing = Storing(keep_original=True)
    data = encoded(Image.new("RGB", (900, 700), RED), "JPEG")
    assert encode(data, storing).jpeg == data
    png = encoded(Image.new("RGB", (900, 700), RED))
    assert pixels(encode(png, storing)).shape == (700, 900, 3)


@pytest.mark.parametrize("storing", [Storing(), Storing(keep_original=True)])
def test_a_jpeg_of_several_pictures_keeps_its_bytes(storing):
    """Telephones write such; the first picture is the image."""
    first, second = (Image.new("RGB", (90, 70), colour) for colour in (RED, "blue"))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    stored = encode(data, storing).jpeg
    assert stored == data
    for decoder in (decode, decode_stored):
        square = decoder(stored, 70, "it").reshape(-1, 3)
        assert np.abs(square.mean(0) - RED).max() <= 4


def test_quality_is_that_of_the_encoder():
    rng = np.random.default_rng(0)
    png = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)))
    sizes = [len(encode(png, Storing(quality=q)).jpeg) for q in (50, 80, 95)]
    assert sizes == sorted(sizes) and sizes[0] * 2 < sizes[2]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_undone(format):
    upright = Image.new("RGB", (64, 32), "black")
    upright.paste(RED, (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    data = encoded(upright.transpose(Image.Transpose.ROTATE_90), format, exif=exif)
    stored = pixels(encode(data, Storing()))
    assert stored.shape == (32, 64, 3)
    assert np.abs(stored[4:28, 4:28].reshape(-1, 3).mean(0) - RED).max() <= 4
    boxed = encode(data, Storing(), (0, 0, 10, 10))
    assert (boxed.jpeg, boxed.box) == (encode(data, Storing()).jpeg, None)


def test_boxes_become_shares_of_the_image():
    data = encoded(Image.new("RGB", (400, 200), RED), "JPEG")
    assert encode(data, Storing()).box == (0.0, 0.0, 1.0, 1.0)
    assert encode(data, Storing(size=50), (100, 20, 300, 120)).box == (
        *(0.1, 0.25),
        *(0.6, 0.75),
    )
    # Boxes that reach over the edge are cut off there.
    assert encode(data, Storing(), (-5, 20, 410, 300)).box == (0.1, 0.0, 1.0, 1.0)
    for box in [(400, 0, 500, 100), (50, 50, 50, 80), (90, 50, 40, 80)]:
        assert encode(data, Storing(), box).box is None  # and the image is stored


JPEG = encoded(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)),
    "JPEG",
)

BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "not an image of a known format"),
    "truncated": (JPEG[: len(JPEG) // 2], "truncated"),
    "header only": (JPEG[:20], "not an image|truncated|broken|cannot"),
    "1 x 1": (encoded(Image.new("RGB", (1, 1))), "1 x 1 pixels, less than 4"),
    "3 x 99": (encoded(Image.new("RGB", (3, 99))), "3 x 99 pixels, less than 4"),
    "20,000 x 20,000": (png_of_size(20_000, 20_000), "more than 178,956,970 pixels"),
    "JPEG bomb": (jpeg_of_size(65_000, 65_000), "more than 178,956,970 pixels"),
    "longer than JPEG allows": (
        encoded(Image.new("1", (65_501, 9))),
        "a side of 65,501 pixels as it would be stored; JPEG allows 65,500",
    ),
    "under the bound": (png_of_size(12_000, 12_000), "truncated|broken|incomplete"),
}


@pytest.mark.parametrize("kind", BAD)
def test_unusable_files_are_told_with_a_reason(kind, tmp_path):
    data, reason = BAD[kind]
    path = tmp_path / "1.jpg"
    path.write_bytes(data)
    records = [Record(str(path), "1.jpg", "1", "train")]
    (result,) = encode_files(records, Storing(), 1)
    assert isinstance(result, str)
    assert re.search(reason, result), result


def test_a_missing_file_is_told(tmp_path):
    records = [Record(str(tmp_path / "1.jpg"), "1.jpg", "1", "train")]
    (result,) = encode_files(records, Storing(), 1)
    assert result == "cannot be read: No such file or directory"


@pytest.mark.slow
def test_a_real_image_of_10_000_x_10_000_is_reduced(tmp_path):
    path = tmp_path / "1.jpg"
    Image.new("RGB", (10_000, 10_000), RED).save(path)
    records = [Record(str(path), "1.jpg", "1", "train")]
    (result,) = encode_files(records, Storing(), 1)
    assert pixels(result).shape == (256, 256, 3)


def test_processes_change_nothing(tmp_path):
    records = []
    for number in range(70):
        path = tmp_path / f"{number}.png"
        path.write_bytes(encoded(Image.new("RGB", (40, 30), (number, 9, 9))))
        records.append(Record(str(path), path.name, "1", "train"))
    (tmp_path / "33.png").write_bytes(b"")
    one = list(encode_files(records, Storing(), 1))
    two = list(encode_files(records, Storing(), 2))
    assert one == two
    assert [type(result) for result in one].count(str) == 1
    assert one[33] == "the file is empty"

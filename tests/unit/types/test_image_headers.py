"""What the first bytes of an image say, and what is refused by them."""

import io
import struct
import zlib

import pytest
from PIL import Image as Pictures

from selfloop.types import images
from selfloop.types.errors import BadRequest
from selfloop.types.images import Size, read_size


def png(width: int = 5, height: int = 3, mode: str = "RGB", **options: object) -> bytes:
    return _file(Pictures.new(mode, (width, height)), "png", **options)


def jpeg(width: int = 5, height: int = 3, **options: object) -> bytes:
    return _file(Pictures.new("RGB", (width, height), (200, 100, 50)), "jpeg", **options)


def _file(picture: Pictures.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_size_of_a_png(mode: str):
    assert read_size(png(17, 4, mode), "png", "image") == Size(17, 4)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"comment": b"x" * 60_000}, {"exif": b"Exif\0\0" + b"x" * 60_000}]
)
def test_size_of_a_jpeg(options: dict[str, object]):
    assert read_size(jpeg(17, 4, **options), "jpeg", "image") == Size(17, 4)


ANIMATED = _file(
    Pictures.new("RGB", (4, 4)), "png", save_all=True, append_images=[Pictures.new("RGB", (4, 4), (9, 9, 9))]
)
REFUSED = {
    "nothing": (b"", "png", "1 to"),
    "too large": (png() + b"x" * images.MAX_IMAGE_BYTES, "png", "bytes"),
    "jpeg named png": (jpeg(), "png", "jpeg"),
    "png named jpeg": (png(), "jpeg", "png"),
    "gif": (_file(Pictures.new("P", (3, 3)), "gif"), "png", "GIF"),
    "webp": (_file(Pictures.new("RGB", (3, 3)), "webp"), "png", "WebP"),
    "svg": (b" <svg xmlns='http://www.w3.org/2000/svg'/>", "png", "SVG"),
    "svg behind a declaration": (b"<?xml version='1.0'?><svg/>", "png", "SVG"),
    "text": (b"hi", "jpeg", "no known format"),
    "animated": (ANIMATED, "png", "not animated"),
    "png cut off": (png(50, 50)[:-20], "png", "cut off"),
    "png of a header": (header(3, 3), "png", "cut off"),
    "png without pixels": (header(3, 3) + chunk(b"IEND", b""), "png", "no pixels"),
    "png of endless chunks": (header(3, 3) + struct.pack(">I4s", 2**31, b"IDAT"), "png", "cut off"),
    "png of too many pixels": (header(2**16, 2**16) + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "png", "pixels"),
    "png of no pixels": (header(0, 7) + chunk(b"IDAT", b"") + chunk(b"IEND", b""), "png", "0 x 7"),
    "jpeg cut off": (jpeg(64, 64)[:-2], "jpeg", "cut off"),
    "jpeg of its magic": (b"\xff\xd8\xff\xe0", "jpeg", "cut off"),
    "jpeg of a segment of no length": (b"\xff\xd8\xff\xe0\0\0" + b"\xff\xd9", "jpeg", "cut off"),
    "jpeg without loss": (b"\xff\xd8\xff\xc3\0\x0b\x08\0\x03\0\x03\x01\x01\x11\0", "jpeg", "baseline"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    data, format, says = REFUSED[case]
    assert format in ("png", "jpeg")
    with pytest.raises(BadRequest, match=says) as refused:
        read_size(data, format, "chunks[2]")
    assert refused.value.field == "chunks[2]"

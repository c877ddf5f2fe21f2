"""Files that look like images by their headers, and are none, or are made to do harm."""

import io
import struct
import zlib

import pytest
from PIL import Image as Pictures

from selfloop.types.images import Image, Size
from selfloop.worker.images.pixels import PixelReader


@pytest.fixture(scope="module")
def reader() -> PixelReader:
    return PixelReader()


def png(width: int, height: int, body: bytes, *more: bytes) -> bytes:
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *more, chunk(b"IDAT", body)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def rows(width: int, height: int) -> bytes:
    return zlib.compress((b"\0" + b"\x7f" * (3 * width)) * height)


def read(reader: PixelReader, data: bytes, format: str = "png") -> bytes:
    return reader(Image("image", 0, 1, format, data), Size(4, 2), 3)  # type: ignore[arg-type]


def whole(format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Pictures.new("RGB", (64, 64), (200, 100, 50)).save(file, format, **options)
    return file.getvalue()


def test_what_is_whole_is_read(reader: PixelReader):
    assert read(reader, png(8, 8, rows(8, 8))) == b"\x7f" * 24
    assert len(read(reader, whole("jpeg"), "jpeg")) == 24


DAMAGED = {
    "no zlib": png(8, 8, b"what is this"),
    "checksum": png(8, 8, rows(8, 8))[:-20] + b"\0" * 8 + png(8, 8, rows(8, 8))[-12:],
    "text that unpacks without end": png(
        8, 8, rows(8, 8), chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 100_000_000))
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_in_words(reader: PixelReader, case: str):
    with pytest.raises(ValueError, match="png file that can be read"):
        read(reader, DAMAGED[case])


def test_a_jpeg_without_its_tables_is_refused(reader: PixelReader):
    data = whole("jpeg")
    first, frame = data.find(b"\xff\xdb"), data.find(b"\xff\xc0")
    with pytest.raises(ValueError, match="jpeg file that can be read"):
        read(reader, data[:first] + data[frame:], "jpeg")


def test_the_most_pixels_fit_the_limits(reader: PixelReader):
    """Seven kilobytes that are a hundred megabytes of pixels."""
    assert read(reader, png(8192, 4096, zlib.compress(bytes((1 + 3 * 8192) * 4096)))) == bytes(24)


def test_it_goes_on_after_a_process_that_died(reader: PixelReader):
    process = reader._helper._running()
    process.kill()
    process.wait()
    assert read(reader, png(8, 8, rows(8, 8))) == b"\x7f" * 24

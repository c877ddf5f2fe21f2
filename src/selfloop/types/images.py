"""Images among tokens, as they travel from the dialects to the engine; and what their first bytes say of them.

Only headers are read here. Pixels are decoded by the worker, in a process of its own.
"""

import struct
from typing import Literal, NamedTuple

import msgspec

from selfloop.types.errors import BadRequest

ImageFormat = Literal["png", "jpeg"]

MAX_IMAGE_BYTES = 16 * 2**20
"""Of one image's file."""

MAX_PIXELS = 2**25
"""Of one image, before it is resized."""

MAX_IMAGES = 256
"""Of one request."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_OTHERS = {
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"<svg": "SVG",
    b"<?xml": "SVG",
}
# Markers that begin a frame: baseline, extended and progressive are what decoders read.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_OTHER_FRAMES = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_SCAN = 0xDA


class Image(msgspec.Struct, frozen=True):
    """An image whose placeholder tokens stand at ``start`` to ``start + num_tokens`` of a sequence.

    ``field`` is where its bytes stand in what the client sent, for errors that are found later.
    """

    field: str
    start: int
    num_tokens: int
    format: ImageFormat
    data: bytes

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int


def read_size(data: bytes, format: ImageFormat, field: str) -> Size:
    """The size of a PNG or JPEG file, by its header.

    Raises:
        BadRequest: for ``field``: another format, more than the limits, animated, or cut off.
    """
    if not 0 < len(data) <= MAX_IMAGE_BYTES:
        raise BadRequest(field, f"1 to {MAX_IMAGE_BYTES} bytes, got {len(data)}")
    found = _kind(data)
    if found != format:
        raise BadRequest(field, f"a {format} file, as it is said to be; its first bytes are {_words(found)}")
    size = _png_size(data, field) if format == "png" else _jpeg_size(data, field)
    if min(size) < 1 or size.width * size.height > MAX_PIXELS:
        raise BadRequest(field, f"1 to {MAX_PIXELS} pixels, got {size.width} x {size.height}")
    return size


def _kind(data: bytes) -> str | None:
    if data.startswith(_PNG):
        return "png"
    if data.startswith(_JPEG):
        return "jpeg"
    return next((name for magic, name in _OTHERS.items() if data.lstrip().startswith(magic)), None)


def _words(kind: str | None) -> str:
    return "those of no known format" if kind is None else f"those of {kind}"


def _png_size(data: bytes, where: str) -> Size:
    size, at, has_pixels = None, len(_PNG), False
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length
        if kind == b"acTL":
            raise BadRequest(where, "an image that is not animated")
        if kind == b"IHDR" and length == 13:
            size = size or Size(*struct.unpack_from(">II", data, at - 4 - length))
        has_pixels = has_pixels or kind == b"IDAT"
        if kind == b"IEND" and at <= len(data):
            if size is None or not has_pixels:
                break
            return size
    raise BadRequest(where, "a whole png file; this one is cut off or has no pixels")


def _jpeg_size(data: bytes, where: str) -> Size:
    size, at = None, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], struct.unpack_from(">H", data, at + 2)[0]
        if marker == 0xFF:
            at += 1
            continue
        if marker in _OTHER_FRAMES:
            raise BadRequest(where, "a baseline or progressive jpeg file")
        if marker in _FRAMES and at + 9 <= len(data):
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = Size(width, height)
        if marker == _SCAN and size is not None and data.rfind(_JPEG_END) > at:
            return size
        if marker == _SCAN or length < 2:
            break
        at += 2 + length
    raise BadRequest(where, "a whole jpeg file; this one is cut off or has no pixels")

"""Decodes images by a process of its own, which starts with the first of them."""

from importlib.util import find_spec

import msgspec

from selfloop.types.errors import OperationFailed
from selfloop.types.images import Image, Size, read_size
from selfloop.worker.text.helper_process import Helper, HelperEnded

CPU_LIMIT_S = 20.0
"""For one image."""

MEMORY_BYTES = 2**30
"""What decoding may take beside the program itself: a picture of the most pixels a few times over."""

_PATIENCE_S = 120.0


class Decode(msgspec.Struct):
    """A file, and the size that it is made, resampled as Pillow numbers it."""

    data: bytes
    format: str
    size: Size
    resized: Size
    resample: int


class Decoded(msgspec.Struct):
    """Rows of RGB bytes; or what was expected of the file."""

    rgb: bytes = b""
    error: str = ""


class PixelReader:
    """Gives pixels as transformers' image processors make them of a file; its orientation (EXIF) is not applied."""

    def __init__(self) -> None:
        self._helper = Helper("selfloop.worker.images.decode", _PATIENCE_S)

    def __call__(self, image: Image, resized: Size, resample: int) -> bytes:
        """Rows of RGB bytes.

        Raises:
            ValueError: the file cannot be read, or not within the limits.
            OperationFailed: there is nothing to read it with.
        """
        if find_spec("PIL") is None:
            raise OperationFailed("images are read by Pillow, which is not installed: pip install 'selfloop[images]'")
        size = read_size(image.data, image.format, image.field)
        request = Decode(image.data, image.format, size, resized, resample)
        try:
            reply = msgspec.json.decode(self._helper.ask(msgspec.json.encode(request)), type=Decoded)
        except HelperEnded as ended:
            if ended.status >= 0:
                raise OperationFailed(f"the process that decodes images {ended}") from None
            raise ValueError(limits()) from None
        if reply.error:
            raise ValueError(reply.error)
        return reply.rgb


def limits() -> str:
    """What was expected of a file that took more."""
    return f"an image that is decoded within {MEMORY_BYTES // 2**20} MiB of memory and {CPU_LIMIT_S:g} s"

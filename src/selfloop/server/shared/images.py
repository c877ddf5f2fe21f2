"""Images of a request: their bytes checked by header, and counted as tokens, before anything is accepted.

No address is ever fetched: an image comes with the request, or it does not come.
"""

import binascii
from array import array

import msgspec

from selfloop.types.errors import BadRequest
from selfloop.types.images import MAX_IMAGE_BYTES, MAX_IMAGES, Image, ImageFormat, read_size
from selfloop.types.vision import TextOnly, VisionFacts

_FORMATS: dict[str, ImageFormat] = {"png": "png", "jpeg": "jpeg"}
# The last is registered nowhere, and sent all the same.
_MEDIA_TYPES: dict[str, ImageFormat] = {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg"}
_DATA_URL = "a data URL, data:image/png;base64,... or data:image/jpeg;base64,...: no URL is fetched"
# Before the comma of a data URL.
_MAX_HEAD = 100


class ImageReader:
    """Reads the images of one request, for the model that it is for."""

    def __init__(self, vision: VisionFacts | TextOnly) -> None:
        self._vision = vision
        self._num = 0

    def kinds(self, text: str, image: str) -> str:
        """What a part of a conversation may be, by the dialect's names of ``text`` and ``image``."""
        sees = isinstance(self._vision, VisionFacts)
        return f"{text} or {image}" if sees else f"{text}: the served model takes text only"

    def check_seen(self, field: str, instead: str) -> VisionFacts:
        """Raises :class:`BadRequest` where the model takes none; ``instead`` is what it takes in the field."""
        if isinstance(self._vision, TextOnly):
            reason = f" ({self._vision.reason})" if self._vision.reason else ""
            raise BadRequest(field, f"{instead}: the served model takes text only{reason}")
        return self._vision

    def add(
        self,
        tokens: "list[int] | array[int]",
        data: bytes,
        format: str,
        expected_tokens: int | None,
        field: str,
    ) -> Image:
        """The image of a chunk behind ``tokens``, which its placeholders are added to.

        Args:
            expected_tokens: what the caller counts it as; None where it does not.

        Raises:
            BadRequest: no image, not one that is served, or one of another number of tokens.
        """
        vision = self.check_seen(field, "encoded_text")
        known = _FORMATS.get(format)
        if known is None:
            raise BadRequest(f"{field}.format", f"png or jpeg, got {format[:100]!r}")
        image = msgspec.structs.replace(self.read(data, known, f"{field}.data"), start=len(tokens))
        if expected_tokens not in (None, image.num_tokens):
            raise BadRequest(
                f"{field}.expected_tokens",
                f"{image.num_tokens}, which is what this model makes of the image; got {expected_tokens}",
            )
        tokens.extend([vision.image_token_id] * image.num_tokens)
        return image

    def read(self, data: bytes, format: ImageFormat, field: str) -> Image:
        """An image whose place is not known yet, so its ``start`` is 0; ``field`` has its bytes.

        Raises :class:`BadRequest` for what is no image, or not one that is served.
        """
        vision = self.check_seen(field, "text")
        self._num += 1
        if self._num > MAX_IMAGES:
            raise BadRequest(field, f"at most {MAX_IMAGES} images in one request")
        size = read_size(data, format, field)
        try:
            return Image(field, 0, vision.sizing.num_tokens(size), format, data)
        except ValueError as error:
            raise BadRequest(field, str(error)) from None

    def from_data_url(self, url: str, field: str) -> Image:
        """As :meth:`read`, of ``data:image/png;base64,...``."""
        scheme, _, rest = url[:_MAX_HEAD].partition(":")
        head, comma, _ = rest.partition(",")
        if scheme.lower() != "data" or not comma:
            raise BadRequest(field, f"{_DATA_URL}; got {_shown_scheme(url)}")
        media_type, _, coding = head.lower().partition(";")
        if coding != "base64":
            raise BadRequest(field, f"{_DATA_URL}; got data:{head}")
        format = format_of(media_type, field)
        return self.read(from_base64(url[len(scheme) + len(head) + 2 :], field), format, field)


def format_of(media_type: str, field: str) -> ImageFormat:
    """Raises :class:`BadRequest` for what is not served."""
    if (format := _MEDIA_TYPES.get(media_type)) is None:
        raise BadRequest(field, f"image/png or image/jpeg, got {media_type[:100]!r}")
    return format


def from_base64(text: str, field: str) -> bytes:
    """Standard base64, with its padding. Raises :class:`BadRequest`."""
    if len(text) > (MAX_IMAGE_BYTES + 2) // 3 * 4:
        raise BadRequest(field, f"at most {MAX_IMAGE_BYTES} bytes")
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(field, f"base64 of an image's file ({error})") from None


def _shown_scheme(url: str) -> str:
    """What a URL begins with, and not what of it may be a secret."""
    scheme, found, _ = url[:20].partition(":")
    return f"{scheme}:..." if found else "no URL"

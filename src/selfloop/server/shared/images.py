"""Images of a request: their bytes checked by header, and counted as tokens, before anything is accepted.

No address is ever fetched: an image comes with the request, or it does not come.
"""

import binascii
from array import array

from selfloop.types.errors import BadRequest
from selfloop.types.images import MAX_IMAGE_BYTES, MAX_IMAGES, Image, read_size
from selfloop.types.vision import TextOnly, VisionFacts


class ImageReader:
    """Reads the images of one request, for the model that it is for."""

    def __init__(self, vision: VisionFacts | TextOnly) -> None:
        self._vision = vision
        self._num = 0

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
        instead: str = "encoded_text",
    ) -> Image:
        """The image behind ``tokens``, which its placeholders are added to.

        Args:
            expected_tokens: what the caller counts it as; None where it does not.

        Raises:
            BadRequest: no image, not one that is served, or one of another number of tokens.
        """
        vision = self.check_seen(field, instead)
        self._num += 1
        if self._num > MAX_IMAGES:
            raise BadRequest(field, f"at most {MAX_IMAGES} images in one request")
        size = read_size(data, format, field)
        try:
            num = vision.sizing.num_tokens(size)
        except ValueError as error:
            raise BadRequest(f"{field}.data", str(error)) from None
        if expected_tokens is not None and expected_tokens != num:
            raise BadRequest(
                f"{field}.expected_tokens",
                f"{num}, as this model takes {size.width} x {size.height} pixels; got {expected_tokens}",
            )
        assert format in ("png", "jpeg")
        image = Image(field, len(tokens), num, format, data)
        tokens.extend([vision.image_token_id] * num)
        return image


def from_base64(text: str, field: str) -> bytes:
    """Standard base64, with its padding. Raises :class:`BadRequest`."""
    if len(text) > (MAX_IMAGE_BYTES + 2) // 3 * 4:
        raise BadRequest(field, f"at most {MAX_IMAGE_BYTES} bytes")
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(field, f"base64 of an image's file ({error})") from None

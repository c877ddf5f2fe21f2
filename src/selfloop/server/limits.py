"""Read request bodies within bounds."""

from fastapi import Request

from selfloop.types.errors import TooLarge

_MIB = 1024 * 1024
# The Loops client caps a request at 24 MiB before it adds the model's name.
MAX_BODY_BYTES = 24 * _MIB + 64 * 1024


async def read_body(request: Request) -> bytes:
    """The whole body. Raises :class:`TooLarge` as soon as the limit is passed, without reading on."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        parts.append(part)
    return b"".join(parts)


def _too_large() -> TooLarge:
    return TooLarge("request body", MAX_BODY_BYTES, "bytes (24 MiB); split the data over several calls")

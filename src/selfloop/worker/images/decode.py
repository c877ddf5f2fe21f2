"""A process that decodes images: what takes too much memory or time, or breaks a decoder, ends here.

Reads one JSON object a line, a :class:`Decode`, and answers each with a :class:`Decoded`.
"""

import io
import resource
import signal
import sys
import warnings
from pathlib import Path

import msgspec
from PIL import Image

from selfloop.worker.images.pixels import CPU_LIMIT_S, MEMORY_BYTES, Decode, Decoded, limits

_WHITE = (255, 255, 255, 255)
# Pillow raises any of these for a damaged file.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, Image.DecompressionBombError)


def decoded(request: Decode) -> Decoded:
    try:
        with Image.open(io.BytesIO(request.data), formats=[request.format.upper()]) as image:
            if image.size != tuple(request.size):
                return Decoded(error=f"an image of the size in its header, {request.size}; it has {image.size}")
            rgb = _as_rgb(image)
        return Decoded(rgb.resize(request.resized, resample=Image.Resampling(request.resample)).tobytes())
    except MemoryError:
        return Decoded(error=limits())
    except _DAMAGED as error:
        return Decoded(error=f"a {request.format} file that can be read: {error}")


def _as_rgb(image: Image.Image) -> Image.Image:
    """What is transparent is laid on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), over).convert("RGB")


def _limit() -> None:
    warnings.simplefilter("ignore")
    Image.preinit()
    # What is mapped by now, which depends on the machine, is not counted.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    _limit()
    for line in sys.stdin.buffer:
        # The default action of the signal ends the process, also in the midst of compiled code.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        try:
            reply = msgspec.json.encode(decoded(msgspec.json.decode(line, type=Decode)))
        except MemoryError:
            reply = msgspec.json.encode(Decoded(error=limits()))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

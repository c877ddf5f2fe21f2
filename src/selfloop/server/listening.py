"""Where the server listens."""

import errno
import socket
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager

from selfloop.types.errors import BadRequest, Conflict, SelfloopError

# A name may have addresses of a kind that this machine has switched off.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


@contextmanager
def bound(host: str, port: int) -> Generator[list[socket.socket]]:
    """Sockets for every address of ``host``, for the length of a block; they take no connections yet.

    Raises:
        BadRequest: the host has no address of this machine, or the port takes special rights.
        Conflict: the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise BadRequest("--host", f"an address of this machine; {host!r} is none ({error.strerror})") from None
    with ExitStack() as stack:
        made: list[socket.socket] = []
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                made.append(stack.enter_context(closing(_bound(socket.socket(family, kind, protocol), address))))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise _refusal(error, host, port) from None
        if not made:
            raise BadRequest("--host", f"an address of this machine; {host!r} is none")
        yield made


def _bound(made: socket.socket, address: tuple[object, ...]) -> socket.socket:
    try:
        # After a restart, connections of the server before this one may still be closing.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:
            # The same port of IPv4 is an address of its own.
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def _refusal(error: OSError, host: str, port: int) -> SelfloopError:
    match error.errno:
        case errno.EADDRINUSE:
            return Conflict(
                f"port {port} of {host} is taken by another program (`selfloop doctor --port {port}` says whether it "
                "is a Selfloop server): stop that, or choose another --port"
            )
        case errno.EACCES:
            return BadRequest("--port", f"one above 1023: {port} takes special rights")
        case _:
            return BadRequest("--host/--port", f"an address to listen on; {host}:{port} is none ({error.strerror})")

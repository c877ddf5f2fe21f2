"""Where the server may listen, and what is said where it may not."""

import errno
import socket
from collections.abc import Callable

import pytest

from selfloop.server.listening import bound
from selfloop.types.errors import BadRequest, Conflict


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_every_address_of_a_name_is_bound():
    port = free_port()
    with bound("localhost", port) as sockets:
        assert ("127.0.0.1", port) in [made.getsockname()[:2] for made in sockets]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    with bound("localhost", port):
        pass


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Conflict, match=rf"^port {port} of 127\.0\.0\.1 is taken .*choose another --port$"):
            with bound("127.0.0.1", port):
                pass


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host"])
def test_an_address_of_another_machine_is_refused(host: str):
    with pytest.raises(BadRequest, match=f"^--host: an address of this machine; '{host}' is none"):
        with bound(host, free_port()):
            pass


def failing(number: int) -> Callable[..., None]:
    def bind(_self: socket.socket, _address: object) -> None:
        raise OSError(number, "no")

    return bind


def test_a_port_of_the_system_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket.socket, "bind", failing(errno.EACCES))
    with pytest.raises(BadRequest, match=r"^--port: one above 1023: 80 takes special rights$"):
        with bound("127.0.0.1", 80):
            pass

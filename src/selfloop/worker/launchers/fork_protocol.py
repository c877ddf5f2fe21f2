"""What a gateway and the fork server of a base model say: a line of JSON a message, over a local socket."""

import socket
import struct

import msgspec

from selfloop.types.settings import EngineSettings, WorkerSettings


class ForkServerStart(msgspec.Struct, frozen=True):
    """What a fork server is started with: all that distinguishes one loaded model from another.

    Args:
        linger_s: how long it waits in memory for a gateway, before the first and after each.
        record: what a gateway notes it in; removed when no other comes.
    """

    model_dir: str
    engine: EngineSettings
    linger_s: float
    record: str | None


class ForkWorker(msgspec.Struct, frozen=True):
    """Make a worker, for the two addresses that it connects to; one that lives still is ended.

    Args:
        begun_path: a file that it keeps the tickets of begun operations in, separated by spaces, up to a line's end.
        log_path: where its output goes.
        roots: of the references that it will get, where they lie on this machine.
    """

    address: str
    heartbeat_address: str
    begun_path: str
    log_path: str
    settings: WorkerSettings
    roots: dict[str, str] = {}


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The fork server's heartbeat, also while it loads; nobody answers it."""


class ForkServerReady(msgspec.Struct, frozen=True, tag=True):
    """Workers can be made; the first word to each gateway but heartbeats. ``pid`` is its own."""

    pid: int


class ForkServerFailed(msgspec.Struct, frozen=True, tag=True):
    """The base model cannot be loaded; the fork server exits. ``error_class`` says whether it ever can."""

    cause: str
    error_class: str = "LoadFailed"


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The worker that was asked for."""

    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """A worker's end; a ``code`` below zero is the signal that ended it."""

    pid: int
    code: int


ForkServerMessage = Alive | ForkServerReady | ForkServerFailed | Forked | Exited

HEARTBEAT_S = 0.5
"""How often a fork server sends one."""

start_decoder = msgspec.json.Decoder(ForkServerStart)
fork_decoder = msgspec.json.Decoder(ForkWorker)
message_decoder: "msgspec.json.Decoder[ForkServerMessage]" = msgspec.json.Decoder(ForkServerMessage)


def to_line(message: ForkWorker | ForkServerMessage) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def peer_user(connection: socket.socket) -> int:
    """The user id of the process at the other end."""
    size = struct.calcsize("3i")
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1]

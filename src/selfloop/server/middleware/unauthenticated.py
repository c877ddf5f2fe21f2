"""Unauthenticated connections that wait for a request's head: bounded in number and bytes, by address."""

from typing import Generic, Protocol, TypeVar

MAX_WAITING = 4096
MAX_WAITING_BYTES = 32 * 2**20


class Waiting(Protocol):
    def give_up(self) -> None:
        """Close, and leave."""


C = TypeVar("C", bound=Waiting)


class Unauthenticated(Generic[C]):
    """Beyond the bounds, the address that has most of them gives up its largest or longest waiting connection.

    So nobody who sends a head at once is kept out by those who do not, unless they share an address.
    """

    def __init__(self, max_waiting: int = MAX_WAITING, max_bytes: int = MAX_WAITING_BYTES) -> None:
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._address_of: dict[C, str] = {}
        self._bytes_of: dict[str, dict[C, int]] = {}
        """By address, the longest waiting first."""
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._address_of)

    @property
    def num_bytes(self) -> int:
        """What has come of heads that are not whole yet."""
        return self._num_bytes

    def wait(self, connection: C, address: str) -> None:
        self.leave(connection)
        self._address_of[connection] = address
        self._bytes_of.setdefault(address, {})[connection] = 0
        if len(self._address_of) > self._max_waiting:
            most = max(self._bytes_of.values(), key=len)
            self._let_go(next(iter(most)))

    def grow(self, connection: C, num_bytes: int) -> None:
        """So much of its head has come; one that is not waiting is no matter."""
        address = self._address_of.get(connection)
        if address is None:
            return
        theirs = self._bytes_of[address]
        self._num_bytes += num_bytes - theirs[connection]
        theirs[connection] = num_bytes
        while self._num_bytes > self._max_bytes:
            most = max(self._bytes_of.values(), key=lambda each: sum(each.values()))
            self._let_go(max(most, key=lambda each: most[each]))

    def leave(self, connection: C) -> None:
        address = self._address_of.pop(connection, None)
        if address is not None:
            theirs = self._bytes_of[address]
            self._num_bytes -= theirs.pop(connection)
            if not theirs:
                del self._bytes_of[address]

    def _let_go(self, connection: C) -> None:
        self.leave(connection)
        connection.give_up()

"""A proxy before a PostgreSQL server that breaks a connection at its COMMIT, before or after the server has it."""

import socket
import threading

from sqlalchemy.engine import URL


class CommitCutter:
    def __init__(self, url: URL) -> None:
        assert url.host is not None
        assert url.port is not None
        self._target = (url.host, url.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = url.set(port=self._listener.getsockname()[1]).update_query_dict({"sslmode": "disable"})
        self.num_cut = 0
        self._cut: bool | None = None
        self._answered = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_next_commit(self, *, arrives: bool) -> None:
        """Whether the server still gets it; the client hears nothing either way."""
        self._cut = arrives

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
            threading.Thread(target=self._back, args=(server, client), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            while data := _received(client):
                if self._cut is not None and b"COMMIT\x00" in data:
                    arrives, self._cut = self._cut, None
                    self.num_cut += 1
                    self._answered.clear()
                    client.shutdown(socket.SHUT_RDWR)
                    if arrives:
                        server.sendall(data)
                        # The server answers, and so has done it, before it hears that nobody listens.
                        self._answered.wait(10)
                    return
                server.sendall(data)

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        while data := _received(server):
            self._answered.set()
            try:
                client.sendall(data)
            except OSError:
                return


def _received(source: socket.socket) -> bytes:
    try:
        return source.recv(65536)
    except OSError:
        return b""

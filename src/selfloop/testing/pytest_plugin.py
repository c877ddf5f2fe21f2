"""The pytest plugin: fixtures around a server of the session, which starts when a test first asks for it."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selfloop.testing import Server

_INI = "selfloop_environment"
_address = pytest.StashKey[tuple[int, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        _INI,
        "Point the clients' environment variables at the server of the session before test modules are imported.",
        type="bool",
        default=False,
    )


def pytest_configure(config: pytest.Config) -> None:
    """Libraries read ``HF_ENDPOINT`` when they are imported: so the address is chosen before there is a server."""
    if config.getini(_INI):
        from selfloop.testing.server import client_environment, free_port

        port, key = free_port(), secrets.token_urlsafe(24)
        config.stash[_address] = (port, key)
        os.environ.update(client_environment(f"http://127.0.0.1:{port}", key))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny random model, of the session."""
    from selfloop.testing import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("selfloop") / "tiny")


@pytest.fixture(scope="session")
def selfloop_server(tiny_model: Path, request: pytest.FixtureRequest) -> "Iterator[Server]":
    """A server of the session with ``tiny_model``, which is started for the first test that asks for it."""
    from selfloop.testing import server

    port, key = request.config.stash.get(_address, (None, None))
    with server(model=tiny_model, port=port, api_key=key) as made:
        yield made


@pytest.fixture
def selfloop_client(selfloop_server: "Server") -> Any:
    """A new service client of the session's server: that of Loops if it is installed, else Tinker's."""
    return selfloop_server.client()

"""A real server inside somebody's own tests, for training loops against it: ``docs/testing.md``.

``selfloop.testing.pytest_plugin`` is loaded by pytest where Selfloop is installed and gives the fixtures
``selfloop_server``, ``selfloop_client`` and ``tiny_model``.
"""

from selfloop.testing.server import TINY_MODEL, Server, ServerFailed, server
from selfloop.testing.tiny_model import make_tiny_model

__all__ = ["TINY_MODEL", "Server", "ServerFailed", "make_tiny_model", "server"]

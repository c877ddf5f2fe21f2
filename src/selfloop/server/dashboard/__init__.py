"""The page at ``/``: a browser's view of what the other dialects serve. It has no routes of its own but its files."""

from selfloop.server.dashboard.dialect import DIALECT

__all__ = ["DIALECT"]

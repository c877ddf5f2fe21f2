"""The Anthropic-compatible face of the whole server: messages, and how many tokens they take."""

from selfloop.server.anthropic.dialect import DIALECT

__all__ = ["DIALECT"]

"""The OpenAI-compatible face of a sampler: chat, completions, models."""

from selfloop.server.openai.dialect import DIALECT

__all__ = ["DIALECT"]

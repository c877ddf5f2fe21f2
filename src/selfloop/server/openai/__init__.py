"""The OpenAI-compatible face of a sampler: chat, completions, models."""

"""The Anthropic-compatible face of the whole server: messages, and how many tokens they take."""

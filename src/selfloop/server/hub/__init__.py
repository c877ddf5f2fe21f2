"""Model files for clients' tokenizers: the hub API behind ``HF_ENDPOINT=<server>/hf``."""

from selfloop.server.hub.routes import HubModels, router

__all__ = ["HubModels", "router"]

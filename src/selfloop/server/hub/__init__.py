"""Model files for clients' tokenizers: the hub API behind ``HF_ENDPOINT=<server>/hf``."""

from selfloop.server.hub.dialect import DIALECT
from selfloop.server.hub.real_hub import DEFAULT_HUB_URL, RealHub, hub_url
from selfloop.server.hub.routes import Hub, HubModels, router

__all__ = ["DEFAULT_HUB_URL", "DIALECT", "Hub", "HubModels", "RealHub", "hub_url", "router"]

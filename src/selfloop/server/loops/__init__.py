"""The Loops data plane: what the official client calls below a run's or a sampler's ``base_url``."""

from selfloop.server.loops.dialect import DIALECT

__all__ = ["DIALECT"]

"""The management API: sessions, runs, samplers, deployments, checkpoints, as the hosted API has them."""

from selfloop.server.management.dialect import DIALECT

__all__ = ["DIALECT"]

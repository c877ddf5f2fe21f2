"""The Tinker dialect: what the official ``tinker`` SDK calls below ``/api/v1``."""

from selfloop.server.tinker.dialect import DIALECT

__all__ = ["DIALECT"]

"""The Tinker dialect: what the official ``tinker`` SDK calls below ``/api/v1``."""

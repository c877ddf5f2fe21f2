"""How an engine divides its device's memory between passes, kept forwards and runs."""

from typing import NamedTuple

from selfloop.engine.backends.base import Planned
from selfloop.engine.backends.device import default_kept_bytes, default_pass_bytes, run_bytes, total_memory
from selfloop.types.settings import EngineLimits


class MemoryShare(NamedTuple):
    """How the device's memory is divided, in bytes."""

    total_bytes: int
    activation_bytes: int
    forward_cache_bytes: int

    @classmethod
    def of(
        cls, model: Planned, limits: EngineLimits, device_bytes: int | None = None, *, beside_bytes: int = 0
    ) -> "MemoryShare":
        """As limited, else by default; ``device_bytes`` is of a device that is not this machine's.

        ``beside_bytes`` is taken by what is no part of the decoder.
        """
        total = (total_memory(model.device) if device_bytes is None else device_bytes) // limits.memory_parts
        weights = model.costs().base_weights
        if limits.memory_bytes is not None:
            total = min(total, limits.memory_bytes)
        total = max(total - beside_bytes, 0)
        activation, kept = limits.activation_bytes, limits.forward_cache_bytes
        return cls(
            total,
            default_pass_bytes(total, weights) if activation is None else activation,
            default_kept_bytes(total, weights) if kept is None else kept,
        )

    def left_for_runs(self, model: Planned, cache_bytes: int) -> int:
        taken = self.activation_bytes + self.forward_cache_bytes + cache_bytes
        return run_bytes(self.total_bytes, model.costs().weights, taken)

"""Adapters ready for sampling, by checkpoint id; the longest unused leave first."""

from collections import OrderedDict

from selfloop.engine.lora.adapter import Adapter
from selfloop.types.errors import NotFound


class AdapterCache:
    """At most ``max_adapters``, beyond which only adapters in use stay."""

    def __init__(self, max_adapters: int) -> None:
        assert max_adapters >= 1
        self._max_adapters = max_adapters
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()

    def __contains__(self, checkpoint_id: str) -> bool:
        return checkpoint_id in self._adapters

    def put(self, checkpoint_id: str, adapter: Adapter, in_use: set[int]) -> None:
        """Add or replace; evicts down to the limit, never an adapter whose ``id`` is in ``in_use``."""
        self._adapters[checkpoint_id] = adapter
        self._adapters.move_to_end(checkpoint_id)
        idle = [k for k, a in self._adapters.items() if id(a) not in in_use and k != checkpoint_id]
        for key in idle[: max(0, len(self._adapters) - self._max_adapters)]:
            del self._adapters[key]

    def get(self, checkpoint_id: str) -> Adapter:
        """The adapter, now the most recently used; raises NotFound."""
        if checkpoint_id not in self._adapters:
            raise NotFound("adapter", checkpoint_id)
        self._adapters.move_to_end(checkpoint_id)
        return self._adapters[checkpoint_id]

    def drop(self, checkpoint_id: str) -> None:
        """Forget it; requests that use it keep it until they end."""
        self._adapters.pop(checkpoint_id, None)

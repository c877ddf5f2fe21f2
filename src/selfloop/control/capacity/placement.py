"""Which capacity a run or sampler gets: of its own (dedicated), or what all share (serverless).

Both are the one worker of the base model. Serverless capacity has no ids, its samples are queued, and it may be
limited, so that what many share is not taken by one.
"""

from typing import Literal, NamedTuple

from selfloop.types.errors import BadRequest
from selfloop.types.settings import CapacitySettings

Scope = Literal["default", "serverless", "deployment"]
"""What a run or sampler asks for."""

UNAVAILABLE = "SERVERLESS_UNAVAILABLE"


class Chosen(NamedTuple):
    """``reason`` is in words, empty where there was nothing to decide."""

    serverless: bool
    reason: str

    def words(self, reuse: str) -> str:
        """With what is to say of reuse, which is of dedicated capacity."""
        return self.reason if self.serverless else "; ".join(filter(None, (reuse, self.reason)))


class Capacity:
    """A server's own rules."""

    def __init__(self, rules: CapacitySettings = CapacitySettings()) -> None:
        self._rules = rules

    def is_serverless(self, stored: bool | None) -> bool:
        """Of a row. One from before capacity was per run is shown as the server shows its others."""
        return self._rules.offered == "serverless" if stored is None else stored

    def choose(
        self, scope: Scope, base_model: str, *, rank: int | None = None, seq_len: int | None = None, reuses: str | None
    ) -> Chosen:
        """The capacity for a run or sampler.

        Args:
            seq_len: what was asked for, None if nothing was.
            reuses: the run or session whose capacity was asked for, in words.

        Raises:
            BadRequest: ``scope`` is serverless, and it cannot be had.
        """
        if scope == "deployment":
            return Chosen(False, "")
        obstacle = self._obstacle(base_model, rank, seq_len, reuses)
        if scope == "serverless":
            if obstacle is not None:
                raise BadRequest("scope", f"deployment or default, as {obstacle}", reason=UNAVAILABLE)
            return Chosen(True, "serverless: asked for by scope")
        if self._rules.offered != "serverless":
            return Chosen(False, "")
        if obstacle is not None:
            return Chosen(False, f"dedicated, as {obstacle}")
        return Chosen(True, "serverless: the default of this server")

    def takes(self, seq_len: int | None) -> bool:
        """Whether there is serverless capacity, and for sequences of that length if one is given."""
        return self._rules.offers_serverless and self._obstacle("", None, seq_len, None) is None

    def shortened(self, seq_len: int) -> int:
        """What a model's length becomes on serverless capacity."""
        return seq_len if self._rules.max_seq_len is None else min(seq_len, self._rules.max_seq_len)

    def _obstacle(self, base_model: str, rank: int | None, seq_len: int | None, reuses: str | None) -> str | None:
        if not self._rules.offers_serverless:
            return f"this server has no serverless capacity for {base_model}; see `selfloop serve --capacity`"
        if reuses is not None:
            return f"it reuses the capacity of {reuses}, and only dedicated capacity is reused"
        if rank is not None and self._rules.max_rank is not None and rank > self._rules.max_rank:
            return f"serverless capacity takes a lora_rank of at most {self._rules.max_rank}, and {rank} was asked for"
        if seq_len is not None and self._rules.max_seq_len is not None and seq_len > self._rules.max_seq_len:
            return f"serverless capacity takes at most {self._rules.max_seq_len} tokens, and {seq_len} were asked for"
        return None

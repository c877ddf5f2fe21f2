"""Which capacity a run or sampler gets: of its own (dedicated), or what all share (serverless).

Both are the one worker of the base model. Serverless capacity has no ids, its samples are queued, and it may be
limited, so that what many share is not taken by one.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from selfloop.types.errors import BadRequest

Offered = Literal["dedicated", "both", "serverless"]
"""Kinds of capacity that a server gives. With the last a run that does not say gets serverless capacity if it can."""

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


@dataclass(frozen=True, slots=True)
class Capacity:
    """A server's own rules.

    Args:
        offered: see there.
        max_rank: largest LoRA rank on serverless capacity; None is the server's own limit.
        max_seq_len: longest sequences there; None is the model's own limit.
    """

    offered: Offered = "dedicated"
    max_rank: int | None = None
    max_seq_len: int | None = None

    @property
    def offers_serverless(self) -> bool:
        return self.offered != "dedicated"

    def is_serverless(self, stored: bool | None) -> bool:
        """Of a row. One from before capacity was per run is shown as the server shows its others."""
        return self.offered == "serverless" if stored is None else stored

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
        if self.offered != "serverless":
            return Chosen(False, "")
        if obstacle is not None:
            return Chosen(False, f"dedicated, as {obstacle}")
        return Chosen(True, "serverless: the default of this server")

    def takes(self, seq_len: int | None) -> bool:
        """Whether there is serverless capacity, and for sequences of that length if one is given."""
        return self.offers_serverless and self._obstacle("", None, seq_len, None) is None

    def shortened(self, seq_len: int) -> int:
        """What a model's length becomes on serverless capacity."""
        return seq_len if self.max_seq_len is None else min(seq_len, self.max_seq_len)

    def _obstacle(self, base_model: str, rank: int | None, seq_len: int | None, reuses: str | None) -> str | None:
        if not self.offers_serverless:
            return f"this server has no serverless capacity for {base_model}; see `selfloop serve --capacity`"
        if reuses is not None:
            return f"it reuses the capacity of {reuses}, and only dedicated capacity is reused"
        if rank is not None and self.max_rank is not None and rank > self.max_rank:
            return f"serverless capacity takes a lora_rank of at most {self.max_rank}, and {rank} was asked for"
        if seq_len is not None and self.max_seq_len is not None and seq_len > self.max_seq_len:
            return f"serverless capacity takes at most {self.max_seq_len} tokens, and {seq_len} were asked for"
        return None

"""Which parts of a model an adapter changes."""

import msgspec

from selfloop.types.errors import BadRequest

MAX_LORA_RANK = 512
"""Of a run, and of an adapter that somebody else made."""


class LoraTargets(msgspec.Struct, frozen=True):
    """The adapted projections.

    Args:
        attn: query, key, value and output projections of every layer.
        mlp: gate, up and down projections of every layer.
        unembed: the output layer; a tied embedding stays as it is.
        experts: gate, up and down projections of every expert of a mixture. Not set in runs from before experts took
            adapters, whose layout stays as it was; a new run has it where it has ``mlp`` and the model has experts.
    """

    attn: bool = True
    mlp: bool = True
    unembed: bool = False
    experts: bool = False

    def __str__(self) -> str:
        return ",".join(name for name in self.__struct_fields__ if getattr(self, name))

    def stored(self) -> str | None:
        """As a row has it: None for the usual targets."""
        return None if self == LoraTargets() else str(self)

    @classmethod
    def parse(cls, text: str | None) -> "LoraTargets":
        """The inverse of ``str``; None is the usual targets."""
        if text is None:
            return cls()
        named = text.split(",")
        return cls(*(name in named for name in cls.__struct_fields__))

    def checked(self, field: str) -> "LoraTargets":
        """Itself. Raises :class:`BadRequest` for ``field`` when nothing is adapted."""
        if not (self.attn or self.mlp or self.unembed or self.experts):
            raise BadRequest(field, "at least one part of the model to train")
        return self

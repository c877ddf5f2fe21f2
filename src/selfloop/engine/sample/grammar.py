"""Constrained drawing: which tokens may come next. What a grammar is, is the caller's business."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from selfloop.types.errors import OperationFailed
from selfloop.types.sampling import StructuredOutput


class GrammarState(Protocol):
    """How far one sample has come in a grammar. Raises OperationFailed where the grammar becomes too complex."""

    def allowed(self) -> bytes:
        """A bit for each token, lowest first: whether it may come next. End tokens do not matter here."""
        ...

    def is_accepting(self) -> bool:
        """Whether the text so far is whole."""
        ...

    def accept(self, token: int) -> None:
        """Go on by an allowed token."""
        ...


class Grammar(Protocol):
    """What the samples of a request must match."""

    def start(self) -> GrammarState: ...


CompileGrammar = Callable[[StructuredOutput], Grammar]
"""Raises BadRequest for what is no schema, expression or grammar, in bounded time."""


class Constraint:
    """The tokens that one sample may draw next.

    Args:
        end_tokens: the model's; never text, whatever the grammar says of them.
        final_tokens: those that end this sample; allowed wherever the text is whole.
    """

    mask_V: Tensor
    """bool, on the CPU."""
    must_end: bool
    """The text is whole and nothing may follow."""

    def __init__(
        self, grammar: Grammar, vocab_size: int, end_tokens: frozenset[int], final_tokens: frozenset[int]
    ) -> None:
        self._state = grammar.start()
        self._vocab_size = vocab_size
        self._end_tokens = sorted(end_tokens)
        self._final_tokens = sorted(final_tokens)
        self._look()

    def accept(self, token: int) -> None:
        """Go on by a token that the mask allows and that is no end. Raises OperationFailed."""
        self._state.accept(token)
        self._look()

    def _look(self) -> None:
        self.mask_V = unpack_bits(self._state.allowed(), self._vocab_size)
        self.mask_V[self._end_tokens] = False
        accepting = self._state.is_accepting()
        self.must_end = accepting and not self.mask_V.any()
        if accepting:
            self.mask_V[self._final_tokens] = True
        elif not self.mask_V.any():
            raise OperationFailed("structured_outputs: no token can follow where the grammar must go on", "BadRequest")


def unpack_bits(packed: bytes, num: int) -> Tensor:
    """(num,) bool from bits, lowest first; what is missing is False."""
    bits = torch.frombuffer(bytearray(packed), dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8)
    flat = (bits & 1).flatten()[:num].bool()
    return torch.nn.functional.pad(flat, (0, num - flat.shape[0]))

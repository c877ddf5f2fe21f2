"""The text of a sample as it grows: whole characters only, and nothing that a stop string may yet take back."""

import codecs
from typing import Protocol


class Vocabulary(Protocol):
    """What the tokens of a model stand for. Ids beyond the tokenizer's stand for nothing."""

    @property
    def num_tokens(self) -> int:
        """One more than the tokenizer's highest id; the model's further ids are padding."""
        ...

    @property
    def drops_first_space(self) -> bool:
        """Whether a text loses the space it begins with, as SentencePiece's do."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8, perhaps a part of a character only; a special token gives its own text."""
        ...

    def text_bytes(self, token: int) -> bytes:
        """What the token adds to a text: its bytes, and nothing for a special token."""
        ...


class StopString:
    """Looks for one string in a text that comes in pieces; each character is looked at once."""

    def __init__(self, text: str) -> None:
        assert text, "an empty string is everywhere"
        self.text = text
        # Knuth, Morris, Pratt: borders[n] is the longest proper border of the first n characters.
        self._borders = [0, 0]
        for char in text[1:]:
            self._borders.append(self.step(self._borders[-1], char))

    def step(self, matched: int, char: str) -> int:
        """How many characters of the string the text ends with, once ``char`` follows ``matched`` of them."""
        while matched > 0 and (matched == len(self.text) or self.text[matched] != char):
            matched = self._borders[matched]
        return matched + 1 if self.text[matched] == char else 0


class SampleText:
    """Text in pieces that stay, and an end that may yet become a stop string; ``stopped_by`` is the one that did."""

    def __init__(self, vocabulary: Vocabulary | None, stops: list[StopString]) -> None:
        assert vocabulary is not None or not stops, "stop strings need a vocabulary"
        self.pieces: list[str] = []
        self.stopped_by: str | None = None
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._matched = [0] * len(stops)
        self._held = ""
        self._drop_space = vocabulary is not None and vocabulary.drops_first_space

    def add(self, token: int) -> bool:
        """Grow by a token; True when a stop string is complete, before which the text then ends."""
        assert self.stopped_by is None
        if self._vocabulary is not None:
            self._grow(self._decoder.decode(self._vocabulary.text_bytes(token)))
        return self.stopped_by is not None

    def finish(self) -> None:
        """Nothing follows: what was held back is text after all, a character cut short becomes U+FFFD."""
        if self.stopped_by is None:
            self._grow(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            self._settle(self._held)
            self._held = ""

    def __str__(self) -> str:
        return "".join(self.pieces)

    def _grow(self, new: str) -> None:
        if self._drop_space and new:
            new, self._drop_space = new.removeprefix(" "), False
        text = self._held + new
        cuts: list[tuple[int, str]] = []
        for which, stop in enumerate(self._stops):
            matched = self._matched[which]
            for at, char in enumerate(new, start=len(self._held) + 1):
                matched = stop.step(matched, char)
                if matched == len(stop.text):
                    cuts.append((at - matched, stop.text))
                    break
            self._matched[which] = matched
        if cuts:
            cut, self.stopped_by = min(cuts, key=lambda found: found[0])
            self._settle(text[:cut])
            return
        settled = len(text) - max(self._matched, default=0)
        self._settle(text[:settled])
        self._held = text[settled:]

    def _settle(self, text: str) -> None:
        if text:
            self.pieces.append(text)

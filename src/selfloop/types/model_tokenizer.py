"""Text to token ids and back, with the model folder's own tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from selfloop.types.errors import BadRequest

MAX_CHARS = 2 * 2**20
"""Of one call: this takes a few seconds at worst."""

# Canonical composition makes text shorter, by no more than this.
_NORMALIZED = 3


class BeyondVocabulary(ValueError):
    """A text has a token that the tokenizer knows and the model does not."""

    def __init__(self, token: str, id: int, vocab_size: int) -> None:
        super().__init__(f"text without {token!r}: that is token {id}, and the model has tokens 0 to {vocab_size - 1}")
        self.token = token


class ModelTokenizer:
    """The tokenizer of a model folder; the engine's vocabulary, too.

    Args:
        tokenizer: without truncation or padding.
        text: its ``tokenizer.json``.
        vocab_size: the model's; None: any token may be encoded to.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, vocab_size: int | None = None) -> None:
        self.text = text
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        decoders = _decoders(json.loads(text).get("decoder"))
        kinds = [decoder["type"] for decoder in decoders]
        self.drops_first_space = any(map(_drops_first_space, decoders))
        self._unbounded = _unbounded(json.loads(text))
        self.num_tokens = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        tokens = [tokenizer.id_to_token(i) or "" for i in range(self.num_tokens)]
        if "ByteLevel" in kinds:
            self._bytes = list(map(_byte_level, tokens))
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            added = tokenizer.get_added_tokens_decoder()
            self._bytes = [t.encode() if i in added else _sentence_piece(t) for i, t in enumerate(tokens)]
        else:
            raise ValueError(f"tokens that are decoded by {kinds or None} have no known bytes")

        self._longest = max(map(len, self._bytes), default=1)

    def check_length(self, text: str, max_tokens: int, field: str) -> None:
        """Raises :class:`BadRequest` for a text that must have more tokens, without tokenizing it.

        No token stands for more bytes than the longest one; where the tokenizer drops or merges text, nothing is known.
        """
        if self._unbounded or len(text) <= max_tokens:
            return
        num_bytes = len(text.encode())
        at_least = -(-num_bytes // (self._longest * _NORMALIZED))
        if at_least > max_tokens:
            raise BadRequest(
                field,
                f"at most {max_tokens} tokens; {num_bytes} bytes of text are at least {at_least}, as no token of this "
                f"model has more than {self._longest} bytes",
            )

    @classmethod
    def load(cls, model_dir: Path, vocab_size: int | None = None) -> "ModelTokenizer":
        """Raises FileNotFoundError, and ValueError for a kind of tokenizer that is not known."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{model_dir} has no tokenizer.json")
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, path.read_text(encoding="utf-8"), vocab_size)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids.

        Raises:
            BeyondVocabulary: the text has a token that the model has not.
            ValueError: it is more text than one should wait for.
        """
        if len(text) > MAX_CHARS:
            raise ValueError(f"at most {MAX_CHARS} characters")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if self._vocab_size is not None and max(ids, default=0) >= self._vocab_size:
            beyond = next(id for id in ids if id >= self._vocab_size)
            raise BeyondVocabulary(self._tokenizer.id_to_token(beyond) or "", beyond, self._vocab_size)
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token] if token < len(self._bytes) else b""

    def text_bytes(self, token: int) -> bytes:
        return b"" if token in self._special else self.token_bytes(token)


def _unbounded(tokenizer: dict[str, Any]) -> bool:
    """Whether a token may stand for any length of text: for spaces around it, or for all that is unknown or dropped."""
    normalizer = tokenizer.get("normalizer")
    parts = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    model = tokenizer["model"]
    is_byte_level = '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))
    return (
        any(token["lstrip"] or token["rstrip"] for token in tokenizer.get("added_tokens", []))
        or not (is_byte_level or model.get("byte_fallback"))
        or any(part and not _keeps_length(part) for part in parts)
    )


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    kind = normalizer["type"]
    return kind in ("NFC", "Prepend") or (kind == "Replace" and normalizer["pattern"] == {"String": " "})


def _decoders(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _drops_first_space(decoder: dict[str, Any]) -> bool:
    if decoder["type"] == "Strip":
        return decoder["content"] == " " and decoder["start"] > 0
    return decoder["type"] == "Metaspace" and decoder.get("prepend_scheme", "always") != "never"


def _byte_of_char() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable ones are themselves, others follow U+0100."""
    themselves = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(byte): byte for byte in themselves} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _byte_level(token: str) -> bytes:
    # A token with any other character stands for itself, as in the library's own decoder.
    if all(char in _BYTE_OF_CHAR for char in token):
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    return token.encode()


def _sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()

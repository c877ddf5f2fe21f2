"""Text to token ids and back, with the model folder's own tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

MAX_CHARS = 2 * 2**20
"""Of one call: the worker does nothing else meanwhile, and this takes a few seconds at worst."""


class ModelTokenizer:
    """The tokenizer of a model folder; the engine's vocabulary, too.

    Args:
        tokenizer: without truncation or padding.
        text: its ``tokenizer.json``.
    """

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._special = {i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        decoders = _decoders(json.loads(text).get("decoder"))
        kinds = [decoder["type"] for decoder in decoders]
        self.drops_first_space = any(map(_drops_first_space, decoders))
        self.num_tokens = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        tokens = [tokenizer.id_to_token(i) or "" for i in range(self.num_tokens)]
        if "ByteLevel" in kinds:
            self._bytes = list(map(_byte_level, tokens))
        elif "ByteFallback" in kinds or "Metaspace" in kinds:
            added = tokenizer.get_added_tokens_decoder()
            self._bytes = [t.encode() if i in added else _sentence_piece(t) for i, t in enumerate(tokens)]
        else:
            raise ValueError(f"tokens that are decoded by {kinds or None} have no known bytes")

    @classmethod
    def load(cls, model_dir: Path) -> "ModelTokenizer":
        """Raises FileNotFoundError, and ValueError for a kind of tokenizer that is not known."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{model_dir} has no tokenizer.json")
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, path.read_text(encoding="utf-8"))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. Raises ValueError for more text than one should wait for."""
        if len(text) > MAX_CHARS:
            raise ValueError(f"at most {MAX_CHARS} characters")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token] if token < len(self._bytes) else b""

    def text_bytes(self, token: int) -> bytes:
        return b"" if token in self._special else self.token_bytes(token)


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

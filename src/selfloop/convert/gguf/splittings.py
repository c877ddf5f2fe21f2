"""How llama.cpp's byte-level tokenizers split a text before its bytes are merged: names that stand for patterns.

The patterns are those of the ``tokenizer.json`` that each name was given to, as llama.cpp's ``llama-vocab.cpp`` cites
them. Only names whose splitting is known exactly are here.
"""

from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+"
_SECOND = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_FIRST}|{_SECOND}|\p{{N}}|{_REST_SLASH}"
_GPT4O = rf"{_FIRST}{_CONTRACTIONS}?|{_SECOND}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_SLASH}"

NAME_OF_PATTERN = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2", _QWEN35: "qwen35", _TEKKEN: "tekken", _GPT4O: "gpt-4o"}
"""The name that is written for each."""

_PATTERNS = {name: pattern for pattern, name in NAME_OF_PATTERN.items()} | {
    "chatglm-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "deepseek-r1-qwen": _QWEN2,
    "falcon3": _LLAMA3,
    "glm4": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _GPT4O,
    "smaug-bpe": _LLAMA3,
}
_GPT2 = frozenset({"gpt-2", "mpt", "olmo", "phi-2"})
_DIGITS_APART = frozenset({"command-r", "refact", "smollm", "starcoder"})
_NORMALISED = frozenset({"qwen2", "qwen35"})

BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
"""GPT-2's bytes as characters; where a text is split, after its words."""
KNOWN = tuple(sorted({*_PATTERNS, *_GPT2, *_DIGITS_APART}))
WHOLE_WORDS_FIRST = frozenset({"falcon3", "llama-bpe", "llama-v3", "llama3", "tekken"})
"""Whose words are one token where the vocabulary has them, whatever the merges say."""
BEGIN_MARKED = frozenset({"falcon3", "llama-bpe", "llama-v3", "llama3", "tekken"})
"""Whose texts begin with the token of beginnings where a file does not say it."""


def pre_tokenizer(name: str) -> dict[str, Any]:
    """``pre_tokenizer`` of a ``tokenizer.json``, of one of :data:`KNOWN`."""
    if name in _GPT2:
        return BYTES
    if name in _DIGITS_APART:
        parts = [{"type": "Digits", "individual_digits": True}, BYTES]
    else:
        split = {"type": "Split", "pattern": {"Regex": _PATTERNS[name]}, "behavior": "Isolated", "invert": False}
        parts = [split, {**BYTES, "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": parts}


def normalizer(name: str) -> dict[str, Any] | None:
    """``normalizer`` of a ``tokenizer.json``: Qwen's own composes characters, which a GGUF does not say."""
    return {"type": "NFC"} if name in _NORMALISED else None

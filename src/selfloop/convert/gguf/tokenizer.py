"""A model folder's tokenizer as GGUF metadata, in the terms of llama.cpp's two tokenizers.

``gpt2`` merges bytes by rank, after a splitting of the text that is only named: the names known here are those whose
splitting is the one that ``tokenizer.json`` writes out. ``llama``, of SentencePiece, merges by the score of the result.
"""

import json
import re
from pathlib import Path
from typing import Any

import gguf

from selfloop.convert.gguf.splittings import NAME_OF_PATTERN
from selfloop.types.errors import OperationFailed

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


def add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, vocab_size: int, end_tokens: tuple[int, ...]) -> None:
    """Add vocabulary, merges, special tokens and chat template; ``end_tokens`` end a sample.

    Raises:
        OperationFailed: llama.cpp has no such tokenizer; the text says why.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise OperationFailed(f"{model_dir} has no tokenizer.json, which a GGUF's vocabulary is made from")
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model: dict[str, Any] = raw["model"]
    if model.get("type") != "BPE" or not model.get("merges"):
        raise OperationFailed(f"llama.cpp has no tokenizer of type {model.get('type')!r} without merges")
    tokens, types = _tokens(raw, vocab_size)
    special = gguf.SpecialVocab(model_dir, load_merges=not model.get("byte_fallback"), n_vocab=vocab_size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model["merges"], tokens))
        writer.add_add_space_prefix(_prepends_space(raw))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(raw))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _set_end_tokens(special, end_tokens)
    # llama.cpp adds one by itself to some tokenizers that are not told.
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _tokens(raw: dict[str, Any], vocab_size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """The text and the kind of each id; ids without a token get a name of their own."""
    model: dict[str, Any] = raw["model"]
    by_id = {int(i): str(token) for token, i in model["vocab"].items()}
    kinds = {i: _kind(token, model) for i, token in by_id.items()}
    for added in raw.get("added_tokens", []):
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    beyond = [token for i, token in by_id.items() if i >= vocab_size]
    if beyond:
        raise OperationFailed(f"tokenizer.json has tokens beyond the model's {vocab_size}, e.g. {beyond[:3]}")
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    return tokens, [kinds.get(i, gguf.TokenType.UNUSED) for i in range(vocab_size)]


def _kind(token: str, model: dict[str, Any]) -> gguf.TokenType:
    if model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(token):
        return gguf.TokenType.BYTE
    return gguf.TokenType.UNKNOWN if token == model.get("unk_token") else gguf.TokenType.NORMAL


def _scores(merges: list[Any], tokens: list[str]) -> list[float]:
    """SentencePiece takes the pair whose result has the highest score; here that of the lowest rank."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        pair: list[str] = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _prepends_space(raw: dict[str, Any]) -> bool:
    """Whether a text begins as if a space were before it."""
    normalizer: dict[str, Any] = raw.get("normalizer") or {}
    splitter: dict[str, Any] = raw.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = normalizer.get("normalizers") or [normalizer]
    if any(part.get("type") == "Prepend" and part.get("prepend") == _SPACE for part in parts):
        return True
    return splitter.get("type") == "Metaspace" and splitter.get("prepend_scheme", "always") != "never"


def _splitting(raw: dict[str, Any]) -> str:
    """llama.cpp's name for how the text is split before its bytes are merged."""
    splitter: dict[str, Any] = raw.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = splitter.get("pretokenizers") or [splitter]
    *first, last = parts
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        own_pattern = last.get("use_regex", True)
        match [part.get("type") for part in first]:
            case [] if own_pattern:
                return "gpt-2"
            case ["Digits"] if own_pattern and first[0].get("individual_digits"):
                return "smollm"
            case ["Split"] if not own_pattern and first[0].get("behavior") == "Isolated" and not first[0].get("invert"):
                name = NAME_OF_PATTERN.get(first[0]["pattern"].get("Regex", ""))
                if name is not None:
                    return name
            case _:
                pass
    known = ["gpt-2", "smollm", *NAME_OF_PATTERN.values()]
    raise OperationFailed(f"the tokenizer splits text in a way that is none of llama.cpp's {', '.join(known)}")


def _set_end_tokens(special: gguf.SpecialVocab, end_tokens: tuple[int, ...]) -> None:
    """llama.cpp knows two: one that ends the text and one that ends a turn."""
    ids = special.special_token_ids
    if end_tokens and ids.get("eos") not in end_tokens:
        ids["eos"] = end_tokens[0]
    others = [token for token in end_tokens if token != ids.get("eos")]
    if others:
        ids.setdefault("eot", others[0])

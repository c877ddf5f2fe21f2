"""The tokenizer that a GGUF's metadata describes, as the files of a model folder.

llama.cpp's ``gpt2`` is byte pairs by rank, and its ``llama`` SentencePiece's pairs by the score of their result, with
bytes for what is in no token.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from selfloop.convert.gguf import splittings
from selfloop.convert.gguf.metadata import Metadata, refusal
from selfloop.types.model_folder import CHAT_TEMPLATES_FOLDER, TOKENIZER_FILE

_SPACE = "\u2581"
_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Ends of a turn, by their texts: where a file names none, llama.cpp looks for these.
_TURN_ENDS = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<EOT>"})


def write_tokenizer(metadata: Metadata, folder: Path, context: int) -> None:
    """Write tokenizer, its configuration and chat templates into ``folder``.

    Raises:
        BadRequest: the tokenizer is of a kind, or splits texts in a way, that is not known here.
    """
    fields, (tokens, kinds) = _fields(metadata), _tokens(metadata)
    ids = {name: fields.get(f"ggml.{key}_token_id") for name, key in _KEYS.items()}
    special = {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    kind, splitting = fields.get("ggml.model"), str(fields.get("ggml.pre", "default"))
    if kind == "gpt2":
        raw = _byte_pairs(metadata, fields, tokens, kinds, splitting)
    elif kind == "llama":
        raw = _sentence_pieces(fields, tokens, kinds)
    else:
        raise refusal(f"{metadata.path} has a tokenizer of kind {kind!r}; known: gpt2, llama{_WAY_OUT}")
    defaults = {"add_bos_token": kind == "llama" or splitting in splittings.BEGIN_MARKED, "add_eos_token": False}
    marks = {name: bool(fields.get(f"ggml.{name}", default)) for name, default in defaults.items()}
    raw["post_processor"] = _marked(marks, ids, special)
    Tokenizer.from_str(json.dumps(raw)).save(str(folder / TOKENIZER_FILE), pretty=False)
    template = {"chat_template": fields["chat_template"]} if "chat_template" in fields else {}
    # The one class that takes tokenizer.json as it is in transformers 4 and 5 alike.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write(folder / "special_tokens_map.json", special)
    _write(folder / "tokenizer_config.json", config | {"model_max_length": context} | template | special)


def write_templates(metadata: Metadata, folder: Path) -> None:
    """Write the chat templates that the file has."""
    for key, template in _fields(metadata).items():
        first, _, name = key.partition(".")
        if first != "chat_template" or not isinstance(template, str):
            continue
        if not name:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        elif name.replace("_", "").isalnum():
            (folder / CHAT_TEMPLATES_FOLDER).mkdir(exist_ok=True)
            (folder / CHAT_TEMPLATES_FOLDER / f"{name}.jinja").write_text(template, encoding="utf-8")


def special_ids(metadata: Metadata) -> dict[str, Any]:
    """The ids of tokens as a ``generation_config.json`` has them; every end of a text or of a turn ends a sample."""
    fields, (tokens, kinds) = _fields(metadata), _tokens(metadata)
    ends = {fields.get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    if fields.get("ggml.eot_token_id") is None:
        marks = (TokenType.CONTROL, TokenType.USER_DEFINED)
        ends |= {i for i, (token, kind) in enumerate(_of(tokens, kinds)) if kind in marks and token in _TURN_ENDS}
    eos = sorted(i for i in ends if isinstance(i, int) and 0 <= i < len(tokens))
    others = {"bos_token_id": fields.get("ggml.bos_token_id"), "pad_token_id": fields.get("ggml.padding_token_id")}
    # A null says that there is none, where transformers has a default for the family.
    return {"eos_token_id": eos[0] if len(eos) == 1 else eos, **others}


def _fields(metadata: Metadata) -> dict[str, Any]:
    return {k.removeprefix("tokenizer."): v for k, v in metadata.fields.items() if k.startswith("tokenizer.")}


def _tokens(metadata: Metadata) -> tuple[list[str], list[int]]:
    """The text and the kind of each id."""
    tokens: list[str] = metadata.fields.get("tokenizer.ggml.tokens") or []
    if not tokens:
        raise refusal(f"{metadata.path} has no vocabulary (tokenizer.ggml.tokens)")
    kinds: list[int] = metadata.fields.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens)
    return tokens, kinds


_WAY_OUT = "; the tokenizer.json of the original model, beside the GGUF file, is taken instead"


def _byte_pairs(
    metadata: Metadata, fields: Mapping[str, Any], tokens: list[str], kinds: list[int], splitting: str
) -> dict[str, Any]:
    merges: list[str] = fields.get("ggml.merges") or []
    if splitting not in splittings.KNOWN or not merges:
        raise refusal(
            f"{metadata.path} has a tokenizer that splits texts as {splitting!r} with {len(merges)} merges; known: "
            f"{', '.join(splittings.KNOWN)}{_WAY_OUT}"
        )
    model = {
        "type": "BPE",
        "vocab": _vocab(tokens, kinds),
        "merges": [merge.split(" ") for merge in merges],
        "ignore_merges": splitting in splittings.WHOLE_WORDS_FIRST,
    }
    return _tokenizer(
        model,
        _added(tokens, kinds),
        normalizer=splittings.normalizer(splitting),
        pre_tokenizer=splittings.pre_tokenizer(splitting),
        decoder=splittings.BYTES,
    )


def _sentence_pieces(fields: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    # What a user defined is one token wherever it is in the text, in which a space is a space.
    own = [
        token.replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else token for token, kind in _of(tokens, kinds)
    ]
    scores: list[float] = fields.get("ggml.scores") or [0.0] * len(tokens)
    unknown = fields.get("ggml.unknown_token_id", 0)
    merged = {
        token: score
        for (token, kind), score in zip(_of(own, kinds), scores, strict=True)
        if kind in (TokenType.NORMAL, TokenType.UNUSED)
    }
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if fields.get("ggml.add_space_prefix", True) else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {
        "type": "BPE",
        "unk_token": own[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": _vocab(own, kinds),
        "merges": _merges(merged),
    }
    return _tokenizer(
        model,
        _added(own, kinds),
        normalizer={"type": "Sequence", "normalizers": [*prefix, space]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    )


def _merges(scores: Mapping[str, float]) -> list[list[str]]:
    """Every pair of tokens that makes a token, best result first; SentencePiece has no list of them."""
    ids = {token: i for i, token in enumerate(scores)}
    pairs = [
        (-score, ids[token[:cut]], ids[token[cut:]], token, cut)
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [[token[:cut], token[cut:]] for *_, token, cut in sorted(pairs)]


def _tokenizer(
    model: dict[str, Any],
    added: list[dict[str, Any]],
    *,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _of(tokens: list[str], kinds: list[int]) -> list[tuple[str, int]]:
    return list(zip(tokens, kinds, strict=True))


def _vocab(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """Without the names that a converter gave to ids that stand for nothing."""
    nothing = {f"[PAD{i}]" for i, kind in enumerate(kinds) if kind == TokenType.UNUSED}
    return {token: i for i, token in enumerate(tokens) if token not in nothing}


def _added(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **plain, "special": kind == TokenType.CONTROL}
        for i, (token, kind) in enumerate(_of(tokens, kinds))
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]


def _marked(marks: Mapping[str, bool], ids: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any] | None:
    """``post_processor``: the tokens that every text begins and ends with."""
    begin, end = (
        [name] if marks[f"add_{name}"] and name in special and isinstance(ids[name], int) else []
        for name in ("bos_token", "eos_token")
    )
    if not begin and not end:
        return None

    def mark(name: str, number: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": special[name], "type_id": number}}

    def template(of: list[str]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(of):
            parts += [mark(name, number) for name in begin]
            parts.append({"Sequence": {"id": part, "type_id": number}})
            parts += [mark(name, number) for name in end]
        return parts

    used = {
        special[name]: {"id": special[name], "ids": [ids[name]], "tokens": [special[name]]} for name in (*begin, *end)
    }
    pair = {"single": template(["A"]), "pair": template(["A", "B"]), "special_tokens": used}
    return {"type": "TemplateProcessing", **pair}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

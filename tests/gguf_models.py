"""Tiny models with a tokenizer that llama.cpp knows, and what is compared of an export."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import tiny_models

TEXT = "the captain said ahoy 123 crew"
SPECIAL = ["<s>", "<bos>", "<eos>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}"
_CORPUS = ["the captain said ahoy 123 to the crew, and the crew said ahoy"] * 5


def save(family: str, folder: Path, tokenizer: Callable[[], Tokenizer] | None = None) -> Path:
    """A tiny model of ``family`` with a tokenizer, ``byte_level`` by default."""
    model_dir = tiny_models.save(family, folder)
    add_tokenizer(model_dir, (tokenizer or byte_level)())
    return model_dir


def add_tokenizer(model_dir: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(model_dir / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | special
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))


def byte_level(splitter: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Byte pairs, after GPT-2's splitting by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<mine>", special=False, normalized=False)])
    return tokenizer


def digits_apart() -> Tokenizer:
    """SmolLM's splitting."""
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return byte_level(pre_tokenizers.Sequence(parts))


def sentence_piece() -> Tokenizer:
    """SentencePiece's kind, with a space before the text; the bytes of its fallback do not all fit."""
    tokenizer = Tokenizer(models.BPE(unk_token="<s>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=[*SPECIAL, "<0x0A>"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<0x0A>"]
    return Tokenizer.from_str(json.dumps(raw))

"""The tokenizer of a model folder: ids, bytes, text."""

import random
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[2]))

from selfloop.engine.sample.text import SampleText
from selfloop.types.model_tokenizer import MAX_CHARS, ModelTokenizer

METASPACE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def sentence_piece(folder: Path, decoder) -> Path:
    letters = ["<unk>", "</s>", "▁", "▁the", "a", "é", "<think>"]
    vocab = {token: i for i, token in enumerate([*letters, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_level(folder: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "Ġa", "æĹ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a"), ("æ", "Ĺ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("two words 日", special=False)])
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def text_of(tokenizer: ModelTokenizer, tokens: list[int]) -> str:
    text = SampleText(tokenizer, [])
    for token in tokens:
        text.add(token)
    text.finish()
    return str(text)


def library(folder: Path, tokens: list[int]) -> str:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=True)


def test_byte_level_text_is_the_librarys_whatever_the_tokens(tmp_path):
    tokenizer = ModelTokenizer.load(byte_level(tmp_path))
    draw = random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(263) for _ in range(12)]
        assert text_of(tokenizer, tokens) == library(tmp_path, tokens)


def test_bytes_of_byte_level_tokens(tmp_path):
    tokenizer = ModelTokenizer.load(byte_level(tmp_path))
    ids = tokenizer.encode(" a日<|end|><think>two words 日", add_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [
        b" a",
        b"\xe6\x97",
        b"\xa5",
        b"<|end|>",
        b"<think>",
        "two words 日".encode(),
    ]
    assert tokenizer.text_bytes(ids[3]) == b""
    assert tokenizer.text_bytes(ids[4]) == b"<think>"
    assert tokenizer.token_bytes(10_000) == b""


@pytest.mark.parametrize("decoder", [decoders.Sequence(METASPACE), decoders.Metaspace()])
def test_sentence_piece_text_is_the_librarys(tmp_path, decoder):
    tokenizer = ModelTokenizer.load(sentence_piece(tmp_path, decoder))
    for tokens in ([3, 4, 3, 1, 3], [1, 3, 4], [2, 2, 5, 6], [4, 3], []):
        assert text_of(tokenizer, tokens) == library(tmp_path, tokens)
    assert tokenizer.token_bytes(3) == b" the"


def test_bytes_that_sentence_piece_falls_back_to(tmp_path):
    tokenizer = ModelTokenizer.load(sentence_piece(tmp_path, decoders.Sequence(METASPACE)))
    tokens = [4, *(7 + byte for byte in "日".encode())]
    assert text_of(tokenizer, tokens) == library(tmp_path, tokens) == "a日"


def test_a_tokenizer_whose_bytes_are_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match="WordPiece"):
        ModelTokenizer.load(sentence_piece(tmp_path, decoders.WordPiece()))
    with pytest.raises(FileNotFoundError):
        ModelTokenizer.load(tmp_path / "nowhere")


def test_more_text_than_one_should_wait_for_is_refused(tmp_path):
    tokenizer = ModelTokenizer.load(byte_level(tmp_path))
    with pytest.raises(ValueError, match="characters"):
        tokenizer.encode("a" * (MAX_CHARS + 1), add_special_tokens=False)

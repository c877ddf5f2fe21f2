"""Tokenizers that come as vocabulary and merges, or as a SentencePiece model, in the form that is served."""

from pathlib import Path

from selfloop.types.errors import BadRequest
from selfloop.types.model_folder import TOKENIZER_FILE
from selfloop.types.model_tokenizer import ModelTokenizer

# What two readings of one tokenizer would differ in: spaces, digits, case, accents, other scripts, emoji, controls.
_PROBE = "  Ahoy, 12345 sailors!\n\n\tžluťoučký kůň 日本語 🦜🏴‍☠️ ﬁ ½ <s> don't WON'T\r\n  def f(x):\n    return x "


def convert_tokenizer(folder: Path) -> None:
    """Write the tokenizer that transformers makes of the folder's files into ``folder``, which is ours.

    Raises:
        BadRequest: transformers cannot read them, or what it reads is not what would be served.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # Each reader of such files has errors of its own.
        raise _refusal(folder, f"{type(error).__name__}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refusal(folder, f"{type(tokenizer).__name__} cannot be converted to {TOKENIZER_FILE}")
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_FILE))
    check_tokenizer(folder)
    converted = ModelTokenizer.load(folder)
    for text in (_PROBE, *_PROBE.split()):
        for special in (False, True):
            expected = tokenizer.encode(text, add_special_tokens=special)
            if converted.encode(text, add_special_tokens=special) != expected:
                raise _refusal(folder, f"what was converted gives other tokens for {text!r}")


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer that the worker could not load (:class:`BadRequest`)."""
    try:
        ModelTokenizer.load(folder)
    except Exception as error:  # The library raises the base class for every file that it cannot read.
        raise _refusal(folder, str(error)) from error


def _refusal(folder: Path, reason: str) -> BadRequest:
    return BadRequest("base_model", f"the tokenizer of {folder} cannot be read: {reason}")

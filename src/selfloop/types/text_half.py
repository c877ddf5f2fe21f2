"""The text half of a model that sees or hears, too: its part of ``config.json``, and its tensors by its own names."""

from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

# Before the names of a text model that is a part of another.
_PREFIXES = ("model.language_model.", "language_model.model.")
_HEADS = ("lm_head.", "language_model.lm_head.")
_OF_THE_WHOLE = ("auto_map", "dtype", "eos_token_id", "quantization_config", "tie_word_embeddings", "torch_dtype")


def text_half(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of a ``config.json`` (``text_config``), or all of it where the model is nothing else.

    What only the whole says of end tokens, code, dtype, quantisation and a tied output layer holds for the part, too.
    """
    text: object = config.get("text_config")
    if not isinstance(text, dict):
        return config
    return {name: config[name] for name in _OF_THE_WHOLE if name in config} | cast("dict[str, Any]", text)


def text_names(stored: dict[str, T]) -> tuple[dict[str, T], bool]:
    """The text model's tensors by the names that it has alone, and whether ``stored`` was of more than that.

    The parts that a quantised weight is stored as keep their endings.
    """
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in stored)), None)
    if prefix is None:
        return stored, False
    text = {f"model.{name.removeprefix(prefix)}": of for name, of in stored.items() if name.startswith(prefix)}
    head = next((head for head in _HEADS if any(name.startswith(head) for name in stored)), None)
    if head is None:
        return text, True
    of_head = {f"lm_head.{name.removeprefix(head)}": of for name, of in stored.items() if name.startswith(head)}
    return text | of_head, True

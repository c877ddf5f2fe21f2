"""Calls about text: the worker holds the model's tokenizer and chat template."""

from selfloop.types.errors import BadRequest
from selfloop.worker.chat import ChatTemplate
from selfloop.worker.protocol import Detokenize, RenderChat, Tokenize
from selfloop.worker.tokens import MAX_CHARS, ModelTokenizer


class TextDesk:
    """Answers between two steps, ahead of queued training."""

    def __init__(self, tokenizer: ModelTokenizer, chat: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._chat = chat

    def answer(self, command: Tokenize | Detokenize | RenderChat) -> list[list[int]] | list[bytes] | list[int]:
        """Raises BadRequest for what cannot be read."""
        match command:
            case Tokenize(texts, add_special_tokens):
                if sum(map(len, texts)) > MAX_CHARS:
                    raise BadRequest("prompt", f"at most {MAX_CHARS} characters")
                return [self._tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]
            case Detokenize(tokens):
                return [self._tokenizer.token_bytes(token) for token in tokens]
            case RenderChat():
                return self._chat.tokens(command)

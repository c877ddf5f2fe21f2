"""From token ids back to text, with the model folder's own tokenizer."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer


def load_decoder(model_dir: Path) -> Callable[[list[int]], str]:
    """A function that decodes token ids; special tokens give no text."""
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{model_dir} has no tokenizer.json")
    tokenizer: Tokenizer = Tokenizer.from_file(str(path))

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return decode

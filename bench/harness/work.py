"""What both sides are given to do: token ids, lengths, masks."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as TextTokenizer

from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor


def random_ids(num: int, vocab_size: int, seed: int) -> list[int]:
    """Ids sampled evenly from the vocabulary, but for the first few, which are mostly special."""
    rng = random.Random(seed)
    return [rng.randrange(3, vocab_size) for _ in range(num)]


def sequences(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """One sequence a length, with the token to predict last besides: each is longer by one."""
    return [random_ids(length + 1, vocab_size, seed) for seed, length in enumerate(lengths)]


def even_lengths(num: int, low: int, high: int) -> list[int]:
    """``num`` lengths evenly spread over ``low`` to ``high``, shuffled the same way each time."""
    assert num >= 2
    lengths = [round(low + (high - low) * i / (num - 1)) for i in range(num)]
    random.Random(0).shuffle(lengths)
    return lengths


def long_tailed_lengths(num: int, low: int, high: int) -> list[int]:
    """As :func:`even_lengths`, but evenly spread in their logarithm: many short ones, few long ones."""
    assert num >= 2
    lengths = [round(low * math.exp(math.log(high / low) * i / (num - 1))) for i in range(num)]
    random.Random(0).shuffle(lengths)
    return lengths


def labels_of(ids: Sequence[int], supervised: float = 1.0) -> list[int]:
    """The next token at each position but the last; only the last ``supervised`` share of them is trained."""
    targets = list(ids[1:])
    num_masked = len(targets) - max(1, round(len(targets) * supervised))
    return [IGNORED_TARGET] * num_masked + targets[num_masked:]


def datum(ids: Sequence[int], supervised: float = 1.0) -> Datum:
    targets = Tensor.of(labels_of(ids, supervised), "int64")
    return Datum(Tensor.of(ids[:-1], "int64"), {"target_tokens": targets})


_TEXTS = (
    "The captain's parrot is called",
    "To make good bread at home, you first need",
    "Once upon a time, in a village by the sea,",
    "The three most important inventions of the last century are",
    "Dear neighbour, I am writing to you because",
    "def fibonacci(n):\n    ",
    "In physics, the second law of thermodynamics says that",
    "My favourite way to spend a Sunday is",
)


def text_prompts(model_dir: Path, vocab_size: int, num: int) -> list[list[int]]:
    """Beginnings of English texts; random ids for a model that comes without a tokenizer."""
    if not (model_dir / "tokenizer.json").is_file():
        return [random_ids(12, vocab_size, seed) for seed in range(num)]
    tokenizer = TextTokenizer.from_file(str(model_dir / "tokenizer.json"))
    return [tokenizer.encode(_TEXTS[i % len(_TEXTS)], add_special_tokens=False).ids for i in range(num)]

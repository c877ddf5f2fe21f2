"""What a GGUF file says of its model, apart from the tensors; who reads it leaves nothing unread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGUFReader, ReaderTensor

from selfloop.types.errors import BadRequest

T = TypeVar("T")

# Keys of an architecture that change no number of what is computed here.
_WITHOUT_MEANING = frozenset(
    {
        "attention.causal",
        "attention.value_length",  # that of keys, or a tensor's shape is another
        "rope.dimension_sections",  # of pictures; the positions of text are the same in every section
        "rope.scaling.finetuned",
        "vocab_size",  # the embedding's rows say it
    }
)


class Metadata:
    """The keys of one or more files of a model, and the tensors by name.

    Args:
        paths: the parts, the first of which has the keys.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.path = paths[0]
        readers = [_opened(path) for path in paths]
        self.fields: Mapping[str, Any] = {key: field.contents() for key, field in readers[0].fields.items()}
        self.tensors: Mapping[str, ReaderTensor] = {t.name: t for reader in readers for t in reader.tensors}
        self._read: set[str] = set()

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def get(self, key: str, kind: type[T]) -> T | None:
        """Of the architecture's ``key``; None where the file does not say it."""
        name = f"{self.architecture}.{key}"
        self._read.add(name)
        value: Any = self.fields.get(name)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise refusal(f"{self.path}: {name} must be one {kind.__name__}, is {value!r:.80}")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """As :meth:`get`, of what every such file says; raises :class:`BadRequest` where this one does not."""
        found = self.get(key, kind)
        if found is None:
            raise refusal(f"{self.path} does not say {self.architecture}.{key}")
        return found

    def number(self, key: str) -> float:
        """A float that was stored in 32 bits, as it was written: 1e-06, and not 9.999999974752427e-07."""
        return rounded(self.need(key, float))

    def check_all_read(self) -> None:
        """Raises :class:`BadRequest` for a key of the architecture that nobody asked for: it may say another model."""
        prefix = f"{self.architecture}."
        known = self._read | {prefix + key for key in _WITHOUT_MEANING}
        if unknown := sorted(key for key in self.fields if key.startswith(prefix) and key not in known):
            raise refusal(f"{self.path} says {', '.join(unknown[:4])}, which is not known of {self.architecture} here")


def rounded(value: float) -> float:
    """The shortest number that is the same in 32 bits."""
    return float(f"{value:.7g}")


def refusal(reason: str) -> BadRequest:
    return BadRequest("base_model", reason)


def _opened(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise refusal(f"{path} cannot be read as GGUF: {error}") from error

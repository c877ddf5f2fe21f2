"""Where the weights of a model are read from."""

from collections.abc import Collection, Iterator
from typing import Protocol

from torch import Tensor


class TensorSource(Protocol):
    """Named tensors that are read when they are asked for."""

    def names(self) -> Collection[str]: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Each of ``names``, in any order, in the layout of a Hugging Face checkpoint."""
        ...

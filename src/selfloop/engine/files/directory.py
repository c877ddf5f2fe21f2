"""Write a set of files into a new directory and make them durable."""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from selfloop.types.digests import seal


class DirectoryWriter:
    """Creates ``directory``, which must not exist; ``close`` returns only when all is on disk.

    The caller renames the directory into place and makes that rename durable.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._paths: list[Path] = []

    def tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """A safetensors file; tensors are copied off their device and out of shared storage."""
        path = self._directory / name
        owned = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        with _as_system_error(path):
            safetensors.torch.save_file(owned, path, metadata={"format": "pt"})
        self._paths.append(path)

    def whole_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """A safetensors file of tensors that share no storage: nothing is copied but what is on another device."""
        path = self._directory / name
        with _as_system_error(path):
            safetensors.torch.save_file({key: value.detach().cpu() for key, value in tensors.items()}, path)
        self._paths.append(path)

    def json(self, name: str, value: Any) -> None:
        """A JSON file from a struct or plain containers."""
        path = self._directory / name
        path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
        self._paths.append(path)

    def text(self, name: str, content: str) -> None:
        self.file(name).write_text(content, encoding="utf-8")

    def file(self, name: str) -> Path:
        """The path of a file that the caller writes."""
        path = self._directory / name
        self._paths.append(path)
        return path

    def seal(self) -> int:
        """As :meth:`close`, with a manifest of digests that readers check; it does not count as bytes written."""
        seal(self._directory)
        return self.close()

    def close(self) -> int:
        """Fsync every file and the directory; returns the bytes written."""
        for path in (*self._paths, self._directory):
            _fsync(path)
        return sum(path.stat().st_size for path in self._paths)


@contextmanager
def _as_system_error(path: Path) -> Generator[None]:
    """The library puts the system's errors, as of a full disk, into words of its own."""
    try:
        yield
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

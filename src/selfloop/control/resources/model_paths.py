"""Where the files of the catalogue's models lie. A path below the data directory is stored relative to it, so that the
directory can be moved, copied and restored elsewhere.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfloop.types.resources import CatalogueEntry

log = logging.getLogger(__name__)

_FOLDER = "models"


class ModelPaths:
    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    @property
    def folder(self) -> Path:
        """Where the models are that we prepare ourselves."""
        return self._data_dir / _FOLDER

    def target(self, model_name: str) -> Path:
        """Where we put the files of a model that we prepare ourselves."""
        return self.folder / model_name.replace("/", "--")

    def stored(self, path: Path) -> str:
        """An absolute path as a row has it."""
        for root in (self._data_dir, self._data_dir.resolve()):
            if path.is_relative_to(root):
                return str(path.relative_to(root))
        return str(path)

    def resolved(self, stored: str) -> Path:
        """The absolute path of what a row has."""
        return self._data_dir / stored

    def outdated(self, rows: Sequence[CatalogueEntry]) -> Iterator[tuple[CatalogueEntry, str]]:
        """Absolute paths that lie below this data directory, here or where it was before, each with what to store.

        Earlier versions stored absolute paths alone, and the directory may have been moved since.
        """
        former = {Path(row.path).parents[1] for row in rows if row.path is not None and _is_ours(row)}
        for row in rows:
            if row.path is None or not Path(row.path).is_absolute():
                continue
            path = Path(row.path)
            here = f"{_FOLDER}/{path.name}" if _is_ours(row) else self._below(path, former)
            if here is not None and here != row.path:
                log.info("%s: its files lie in %s of the data directory (recorded was %s)", row.name, here, path)
                yield row, here

    def _below(self, path: Path, former: set[Path]) -> str | None:
        """Where the folder that a user gave lies below the data directory, if it does."""
        if (stored := self.stored(path)) != str(path):
            return stored
        for root in former:
            if path.is_relative_to(root) and (self._data_dir / path.relative_to(root)).is_dir():
                return str(path.relative_to(root))
        if path.is_dir():
            return None
        # No row says where the directory was. A folder of ours with a model, which ends as the lost path does, is it.
        tails = ("/".join(path.parts[start:]) for start in range(1, len(path.parts) - 1))
        return next((tail for tail in tails if (self._data_dir / tail / "config.json").is_file()), None)


def _is_ours(row: CatalogueEntry) -> bool:
    """Whether we prepared the files, which we always do in one folder of the data directory."""
    path = Path(row.path or "")
    return row.source != "folder" and path.is_absolute() and path.parent.name == _FOLDER

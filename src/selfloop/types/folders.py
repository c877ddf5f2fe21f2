"""Files of folders that somebody else made: a link in one must not lead to what is elsewhere on this machine."""

from pathlib import Path

from selfloop.types.errors import BadRequest


def is_own_file(folder: Path, name: str) -> bool:
    """Whether ``folder`` has a file of this name inside it.

    Files in the ``blobs`` of a Hugging Face cache count, which a snapshot there is links to.
    """
    file = folder / name
    if not file.is_file():
        return False
    root = folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    return any(file.resolve().is_relative_to(home) for home in homes)


def check_links(folder: Path, field: str) -> None:
    """Raises :class:`BadRequest` for ``field`` if a link in ``folder`` leads out of it."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and file.is_file() and not is_own_file(folder, file.name):
            raise BadRequest(field, f"a folder whose files lie in it; {file} is a link to {file.resolve()}")

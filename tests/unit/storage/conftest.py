"""What is synced to disk, and when."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """Syncs and renames as they happen, by the path below ``tmp_path``."""
    seen: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append(("sync", str(path.relative_to(tmp_path))))
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        seen.append(("rename", str(Path(target).relative_to(tmp_path))))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return seen

"""A package beside Selfloop, as pip would leave it: what tests of additions from outside the tree run with."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

EntryPoints = dict[str, dict[str, str]]
"""Group -> name -> ``module:attribute``."""

_TESTS = Path(__file__).parent
EXAMPLES = _TESTS.parent / "examples"


def declared(package: Path) -> EntryPoints:
    """The entry points of the package's ``pyproject.toml``."""
    return tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]


def install(package: Path, entry_points: EntryPoints, folder: Path) -> str:
    """The Python path of a process in which the package is installed; ``folder`` takes its metadata."""
    metadata = folder / "added-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 0.1.0\n")
    sections = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in p.items()) for group, p in entry_points.items())
    (metadata / "entry_points.txt").write_text("\n".join(sections))
    return os.pathsep.join(map(str, (folder, package, _TESTS)))


def run(program: str, *arguments: object, path: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: entry points are read when the modules are imported."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)

"""What the documentation says the official clients offer is what they offer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import REPO

SURFACE = REPO / "docs" / "clients" / "surface.py"

pytestmark = pytest.mark.clients


def check_surface(python: str, client: str, cwd: Path) -> None:
    done = subprocess.run([python, str(SURFACE), client], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((SURFACE.parent / f"{client}.json").read_text(encoding="utf-8"))


def test_baseten(tmp_path: Path):
    check_surface(sys.executable, "baseten", tmp_path)


@pytest.mark.parametrize("client", ["baseten-loops", "baseten-loops-tinker"])
def test_loops(client_python: str, client: str, tmp_path: Path):
    check_surface(client_python, client, tmp_path)


def test_truss(truss_command: Path, tmp_path: Path):
    check_surface(str(truss_command.with_name("python")), "truss", tmp_path)

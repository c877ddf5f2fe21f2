"""The engine as a documented library: its members, its page and its example."""

import re
import subprocess
import sys
from pathlib import Path

import selfloop.engine
from gateway import REPO, environment
from selfloop.engine.engine import Engine
from selfloop.testing import make_tiny_model

MEMBERS = ["Engine", "ModelInfo", "SavedState"]


def test_exported_members():
    assert selfloop.engine.__all__ == MEMBERS
    assert [getattr(selfloop.engine, name).__name__ for name in MEMBERS] == MEMBERS
    assert not hasattr(selfloop.engine, "Nothing")


def test_the_package_alone_needs_no_pytorch():
    program = "import sys, selfloop.engine; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_every_public_method_is_on_the_page():
    """And what the page names is there; ``info`` is an attribute."""
    page = (REPO / "docs" / "engine.md").read_text()
    table = page[page.index("| to | methods") :]
    named = set(re.findall(r"`([a-z_]+)`", table[: table.index("\n\n")]))
    assert named == {name for name in vars(Engine) if not name.startswith("_")} | {"info"}


def test_the_example_learns(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model")
    command = [sys.executable, str(REPO / "examples" / "engine_only.py"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", done.stdout)]
    assert len(losses) == 15
    assert losses[-1] < 0.7 * losses[0]

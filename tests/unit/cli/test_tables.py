"""What the lists print: nothing cut short, one row a line for whoever reads it through a pipe."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[3]


def run(*arguments: str, data_dir: Path) -> str:
    command = [sys.executable, "-m", "selfloop.cli.main", *arguments, "--data-dir", str(data_dir)]
    environment = {**os.environ, "PYTHONPATH": str(REPO / "src"), "COLUMNS": "40"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_names_are_whole(tmp_path: Path) -> None:
    name, alias = "HuggingFaceTB/SmolLM2-135M-Instruct", "somebody/with-a-rather-long-name-for-the-same-model"
    run("models", "add", name, "--alias", alias, data_dir=tmp_path)
    lines = run("models", "list", data_dir=tmp_path).splitlines()
    assert any(name in line and alias in line for line in lines)


def test_keys_are_listed_by_their_beginning_only(tmp_path: Path) -> None:
    key = run("keys", "create", "laptop", data_dir=tmp_path).strip()
    listed = run("keys", "list", data_dir=tmp_path)
    assert key not in listed
    assert key[:8] in listed
    assert "laptop" in listed

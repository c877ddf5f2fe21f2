"""What the lists print: nothing cut short, one row a line for whoever reads it through a pipe, and JSON."""

import json
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


def test_programs_get_json(tmp_path: Path) -> None:
    made = json.loads(run("keys", "create", "ci", "--role", "read-only", "--json", data_dir=tmp_path))
    (listed,) = json.loads(run("keys", "list", "--json", data_dir=tmp_path))
    assert (made["name"], made["role"]) == (listed["name"], listed["role"]) == ("ci", "read-only")
    assert made["key"].startswith(listed["prefix"])
    assert json.loads(run("keys", "revoke", listed["id"], "--json", data_dir=tmp_path)) == {
        "id": listed["id"],
        "revoked": True,
    }
    (model,) = json.loads(run("models", "list", "--json", data_dir=tmp_path))
    assert model["source"] == "embedded"
    checks = json.loads(run("doctor", "--json", data_dir=tmp_path))
    assert {"Python", "PyTorch", "memory", "data directory"} <= {check["subject"] for check in checks}
    assert json.loads(run("doctor", "--verify", "--json", data_dir=tmp_path))["is_sound"]

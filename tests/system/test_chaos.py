"""The fault bench in short: a script of the official client while worker and server are killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import REPO, environment

pytestmark = pytest.mark.clients


@pytest.mark.parametrize(("client", "steps", "kills"), [("loops", 10, 5), ("tinker", 4, 2)])
def test_nothing_is_lost_repeated_or_different(
    client: str, steps: int, kills: int, tiny_model_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    chosen = {}
    if client == "loops":
        chosen["SELFLOOP_CLIENT_PYTHON"] = request.getfixturevalue("client_python")
    elif not (REPO / ".venv-tinker").exists() and "CI" not in os.environ:
        pytest.skip("no tinker SDK: `make setup` makes one in .venv-tinker")
    figures = tmp_path / "figures.json"
    arguments = [str(tiny_model_folder), "--client", client, "--steps", str(steps), "--kills", str(kills)]
    arguments += ["--dtype", "float32", "--length", "12", "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.chaos", *arguments],
        cwd=REPO,
        env=environment(**chosen),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["strikes"] > 0, "the check can fail"
    assert (found["lost"], found["repeated"], found["different_outcomes"], found["different_files"]) == (0, 0, 0, 0)
    assert found["num_files"] > 0

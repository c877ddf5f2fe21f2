"""Router replay by the official clients on a model with experts: sampled, trained on, and sampled routes kept."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tinker_exit import ended_well

from gateway import KEY, Gateway, Json, environment

SCRIPTS = Path(__file__).parent / "scripts"

pytestmark = pytest.mark.clients


def report_of(python: str, script: str, gateway: Gateway, folder: Path, **variables: str) -> Json:
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"} | variables
    command = [python, str(SCRIPTS / script)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=250, check=False)
    assert ended_well(done.returncode), f"{done.stderr[-3000:]}\n{gateway.log[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def difference(one: Any, other: Any) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_by_the_loops_client(client_python: str, experts_gateway: Gateway, tmp_path: Path):
    said = report_of(
        client_python,
        "replay_loops.py",
        experts_gateway,
        tmp_path,
        LOOPS_BASE_URL=experts_gateway.url,
        BASETEN_API_KEY=KEY,
        WANDB_MODE="disabled",
    )
    assert all(uri.startswith("bt://loops:") for uri in said["refs"])
    assert said["plain"]
    for sampled, before in zip(said["sampled"], said["before"], strict=True):
        assert difference(sampled, before) < 1e-5
    # The weights have moved, and with them what the router would choose now.
    assert all(difference(*rows) > 1e-3 for rows in zip(said["after"], said["again"], strict=True))
    assert said["metrics"]["num_replayed_tokens"] == 2 * 29
    assert said["norm"] > 0
    assert "data[0].routed_experts_ref.uri" in said["refused"]


def test_by_the_tinker_client(tinker_python: str, experts_gateway: Gateway, tmp_path: Path):
    said = report_of(
        tinker_python,
        "replay_tinker.py",
        experts_gateway,
        tmp_path,
        TINKER_BASE_URL=experts_gateway.url,
        TINKER_API_KEY=f"tml-{KEY}",
        TINKER_TELEMETRY="0",
    )
    assert difference(said["sampled"], said["before"]) < 1e-5
    assert difference(said["after"], said["again"]) > 1e-3

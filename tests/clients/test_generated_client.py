"""A client that openapi-python-client generates from our OpenAPI document, against a real gateway."""

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest

from gateway import KEY, REPO, Gateway, ok

SCRIPT = Path(__file__).parent / "scripts" / "generated_checks.py"
# One body is protobuf; two have an object for a default, which the generator does not know.
LEFT_OUT = {"POST /api/v1/forward_backward", "POST /api/v1/sessions/search", "POST /api/v1/checkpoints/search"}


@pytest.fixture(scope="module")
def openapi_tools() -> Path:
    """The folder of programs of the generator's environment."""
    folder = Path(os.environ.get("SELFLOOP_OPENAPI_TOOLS", str(REPO / ".venv-openapi" / "bin")))
    if not (folder / "openapi-python-client").exists():
        missing = (
            "no OpenAPI generator: `make setup` puts one in .venv-openapi; or name its bin in SELFLOOP_OPENAPI_TOOLS"
        )
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return folder


def test_a_generated_client_makes_a_run(openapi_tools: Path, gateway: Gateway, http: httpx.Client, tmp_path: Path):
    document = ok(http.get("/openapi.json"))
    assert document["servers"] == [{"url": gateway.url}]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "config.yaml").write_text("post_hooks: []\n")
    command = [str(openapi_tools / "openapi-python-client"), "generate", "--meta", "none"]
    command += ["--path", "openapi.json", "--config", "config.yaml", "--output-path", "generated"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    warned = [line for line in (made.stdout + made.stderr).splitlines() if line.startswith("WARNING parsing")]
    assert {" ".join(line.split()[2:4]) for line in warned} == LEFT_OUT

    asked = [str(openapi_tools / "python"), str(SCRIPT), str(tmp_path), gateway.url, KEY]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["types"] == ["LoopsRunV1", "LoopsSamplerV1", "DeploymentStatusV1"]
    assert (said["is_read"], said["is_listed"], said["ended"]) == (True, True, True)
    assert all(isinstance(id, str) for id in said["ids"])
    assert ok(http.get(f"/v1/loops/runs/{said['twin']}"))["run"]["id"] == said["twin"]

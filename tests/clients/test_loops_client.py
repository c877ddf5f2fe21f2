"""The official, unmodified ``baseten-loops`` client against a real gateway and worker."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

from gateway import KEY, Gateway, environment

SCRIPT = Path(__file__).parent / "scripts" / "loops_checks"
CHECKS = [
    node.name.removeprefix("check_")
    for module in sorted(SCRIPT.glob("*.py"))
    for node in ast.parse(module.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def report(client_python: str, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Each check's outcome, of one run of the script: the client takes seconds to import."""
    folder = tmp_path_factory.mktemp("client")
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {
        "LOOPS_BASE_URL": gateway.url,
        "BASETEN_API_KEY": KEY,
        "HF_ENDPOINT": f"{gateway.url}/hf",
        "HF_HOME": str(folder / "hub"),
        "WANDB_MODE": "disabled",
    }
    done = subprocess.run(
        [client_python, str(SCRIPT)], env=env, cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{done.stderr}\n{gateway.log}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_official_client(report: dict[str, str | None], check: str):
    trouble = report["check_" + check]
    assert trouble is None, trouble

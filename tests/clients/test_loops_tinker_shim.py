"""The official, unmodified ``tinker`` package of ``baseten-loops-tinker`` against a real gateway and worker."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

from gateway import KEY, Gateway, environment

SCRIPT = Path(__file__).parent / "scripts" / "tinker_shim_checks.py"
SOURCE = SCRIPT.read_text()
CHECKS = [
    node.name for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]

# `local` and `ensure_ready_for_deployment` are for servers without a management API and without keys.
NOT_FOR_US = {"local", "ensure_ready_for_deployment"}
PUBLIC = """
import json, tinker
from tinker._service_client import _RestClient
kinds = (tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient, tinker.APIFuture, _RestClient)
print(json.dumps(sorted({name for kind in kinds for name in dir(kind) if not name.startswith("_")})))
"""

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def tinker_python(client_python: str) -> str:
    done = subprocess.run([client_python, "-c", "import tinker"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{client_python} has no tinker: `make setup` installs it\n{done.stderr}"
    return client_python


@pytest.fixture(scope="module")
def report(tinker_python: str, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Each check's outcome, of one run of the script: the client takes seconds to import."""
    folder = tmp_path_factory.mktemp("tinker")
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {
        "LOOPS_BASE_URL": gateway.url,
        "BASETEN_API_KEY": KEY,
        "HF_ENDPOINT": f"{gateway.url}/hf",
        "HF_HOME": str(folder / "hub"),
        "WANDB_MODE": "disabled",
    }
    done = subprocess.run(
        [tinker_python, str(SCRIPT)], env=env, cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{done.stderr}\n{gateway.log}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_tinker(report: dict[str, str | None], check: str):
    assert report[check] is None, report[check]


def test_every_public_method_is_called(tinker_python: str):
    said = subprocess.run([tinker_python, "-c", PUBLIC], capture_output=True, text=True, check=True).stdout
    missing = {name for name in json.loads(said) if f".{name}" not in SOURCE}
    assert missing - NOT_FOR_US == set()

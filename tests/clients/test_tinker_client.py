"""The official, unmodified ``tinker`` SDK against a real gateway and worker."""

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest

from gateway import KEY, REPO, Gateway, environment

SCRIPT = Path(__file__).parent / "scripts" / "tinker_checks"
CHECKS = [
    f"{module.stem}.{node.name}"
    for module in sorted(SCRIPT.glob("*.py"))
    for node in ast.parse(module.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def tinker_python() -> str:
    """A Python that has the SDK."""
    candidates = [os.environ.get("SELFLOOP_TINKER_PYTHON"), str(REPO / ".venv-tinker" / "bin" / "python")]
    for candidate in candidates:
        if candidate and Path(candidate).exists() and _has_sdk(candidate):
            return candidate
    missing = "no tinker SDK: `make setup` makes one in .venv-tinker; or name a Python in SELFLOOP_TINKER_PYTHON"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def _has_sdk(python: str) -> bool:
    probe = "from importlib.metadata import version; assert version('tinker') == '0.38.0'"
    return subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def report(tinker_python: str, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Each check's outcome, of one run of the script."""
    folder = tmp_path_factory.mktemp("tinker")
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {
        "TINKER_BASE_URL": gateway.url,
        "TINKER_API_KEY": f"tml-{KEY}",
        "TINKER_TELEMETRY": "0",
        "HOME": str(folder),
    }
    done = subprocess.run(
        [tinker_python, str(SCRIPT)], env=env, cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{done.stderr}\n{gateway.log}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_official_sdk(report: dict[str, str | None], check: str):
    trouble = report[check]
    assert trouble is None, trouble

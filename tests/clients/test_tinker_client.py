"""The official, unmodified ``tinker`` SDK against a real gateway and worker."""

import ast
import json
import subprocess
from pathlib import Path

import pytest
from tinker_exit import ended_well

from gateway import KEY, Gateway, environment

SCRIPT = Path(__file__).parent / "scripts" / "tinker_checks"
MODULES = ("training", "losses", "checkpoints", "sampling", "rest", "refusals")
WITH_TORCH = ("custom_losses",)
CHECKS = [
    (module, node.name)
    for module in MODULES + WITH_TORCH
    for node in ast.parse((SCRIPT / f"{module}.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]

pytestmark = pytest.mark.clients


class Reports:
    """What a module's checks came to, of one run for the modules that one Python can run."""

    def __init__(self, gateway: Gateway, folder: Path, request: pytest.FixtureRequest) -> None:
        self._gateway = gateway
        self._folder = folder
        self._request = request
        self._known: dict[tuple[str, ...], dict[str, str | None]] = {}

    def of(self, module: str) -> dict[str, str | None]:
        modules, fixture = (WITH_TORCH, "cookbook_python") if module in WITH_TORCH else (MODULES, "tinker_python")
        if modules not in self._known:
            self._known[modules] = self._run(self._request.getfixturevalue(fixture), modules)
        return self._known[modules]

    def _run(self, python: str, modules: tuple[str, ...]) -> dict[str, str | None]:
        env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
        env |= {
            "TINKER_BASE_URL": self._gateway.url,
            "TINKER_API_KEY": f"tml-{KEY}",
            "TINKER_TELEMETRY": "0",
            "HOME": str(self._folder),
        }
        command = [python, str(SCRIPT), *modules]
        done = subprocess.run(
            command, env=env, cwd=self._folder, capture_output=True, text=True, timeout=280, check=False
        )
        assert ended_well(done.returncode), f"{done.stderr}\n{self._gateway.log}"
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def reports(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Reports:
    return Reports(gateway, tmp_path_factory.mktemp("tinker"), request)


def test_every_module_of_checks_is_run():
    assert {path.stem for path in SCRIPT.glob("*.py")} - {"__main__", "shared"} == {*MODULES, *WITH_TORCH}


@pytest.mark.parametrize(("module", "check"), CHECKS)
def test_official_sdk(reports: Reports, module: str, check: str):
    trouble = reports.of(module)[f"{module}.{check}"]
    assert trouble is None, trouble

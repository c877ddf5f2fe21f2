"""``examples/ci``: somebody's project with its own pytest, in which Selfloop is installed with its plugin."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import installed_package
from gateway import REPO, environment

EXAMPLE = REPO / "examples" / "ci"

pytestmark = pytest.mark.clients


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """Of a pytest that finds the plugin as pip installs it: by the entry points of our own package."""
    declared = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"]
    path = installed_package.install(REPO / "src", {"pytest11": declared["pytest11"]}, tmp_path)
    return environment() | {"PYTHONPATH": path, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}


def test_the_projects_tests_pass(cookbook_python: str, variables: dict[str, str], tmp_path: Path):
    command = [cookbook_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(EXAMPLE)]
    done = subprocess.run(command, env=variables, cwd=EXAMPLE, capture_output=True, text=True, timeout=280, check=False)
    # Threads of the SDK at times abort its interpreter at the very end: what counts is what pytest said.
    assert re.search(r"^2 passed", done.stdout, re.MULTILINE), f"{done.stdout[-6000:]}{done.stderr[-3000:]}"


def test_the_plugin_gives_its_fixtures(cookbook_python: str, variables: dict[str, str], tmp_path: Path):
    """Without the setting nobody's environment is touched, and each fixture is what the documentation says."""
    (tmp_path / "test_fixtures.py").write_text(
        "import os\n"
        "def test_all(selfloop_server, selfloop_client, tiny_model):\n"
        "    assert 'TINKER_BASE_URL' not in os.environ\n"
        "    assert selfloop_server.model_folder == tiny_model\n"
        "    models = selfloop_client.get_server_capabilities().supported_models\n"
        "    assert selfloop_server.model in [model.model_name for model in models]\n"
    )
    command = [cookbook_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_fixtures.py"]
    done = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert re.search(r"^1 passed", done.stdout, re.MULTILINE), f"{done.stdout[-6000:]}{done.stderr[-3000:]}"


def test_the_client_of_loops_comes_first(torch_client_python: str, variables: dict[str, str], tmp_path: Path):
    (tmp_path / "test_loops.py").write_text(
        "def test_it(selfloop_server, selfloop_client):\n"
        "    trainer = selfloop_client.create_lora_training_client(base_model=selfloop_server.model, rank=4)\n"
        "    assert type(selfloop_client).__module__.startswith('baseten.loops')\n"
        "    assert trainer.run_id\n"
    )
    command = [torch_client_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_loops.py"]
    done = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert re.search(r"^1 passed", done.stdout, re.MULTILINE), f"{done.stdout[-6000:]}{done.stderr[-3000:]}"

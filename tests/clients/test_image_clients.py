"""The official, unmodified clients train on a picture and ask about it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tinker_exit import ended_well

import seeing_models
from gateway import KEY, REPO, environment
from seeing_gateway import SeeingGateway
from selfloop.types.images import read_size

SCRIPTS = Path(__file__).parent / "scripts"
PNG = seeing_models.encoded(seeing_models.picture(1, 70, 40))

pytestmark = pytest.mark.clients


@pytest.fixture(params=["loops", "tinker"])
def dialect(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def python(request: pytest.FixtureRequest, dialect: str) -> str:
    if dialect == "loops":
        return request.getfixturevalue("client_python")
    python = os.environ.get("SELFLOOP_TINKER_PYTHON", str(REPO / ".venv-tinker" / "bin" / "python"))
    if not Path(python).exists():
        missing = "no tinker SDK: `make setup` makes one in .venv-tinker"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return python


@pytest.mark.parametrize("family", seeing_models.FAMILIES)
def test_official_client(seeing: SeeingGateway, tmp_path: Path, dialect: str, python: str, family: str):
    facts, gateway, folder = seeing.facts[family], seeing.gateway, tmp_path
    (folder / "picture.png").write_bytes(PNG)
    num = facts.sizing.num_tokens(read_size(PNG, "png", "picture"))
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    if dialect == "loops":
        env |= {"LOOPS_BASE_URL": gateway.url, "BASETEN_API_KEY": KEY, "WANDB_MODE": "disabled"}
    else:
        env |= {"TINKER_BASE_URL": gateway.url, "TINKER_API_KEY": f"tml-{KEY}", "TINKER_TELEMETRY": "0"}
    env |= {"HF_ENDPOINT": f"{gateway.url}/hf", "HF_HOME": str(folder / "hub")}
    script = str(SCRIPTS / f"image_checks_{dialect}.py")
    done = subprocess.run(
        [python, script, f"tiny/{family}", str(folder / "picture.png"), str(num)],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended_well(done.returncode), f"{done.stderr}\n{gateway.log}"
    trouble = json.loads(done.stdout.splitlines()[-1])
    assert trouble is None, trouble


@pytest.mark.parametrize("family", seeing_models.FAMILIES)
def test_the_example_trains_on_pictures_and_asks_by_chat(
    seeing: SeeingGateway, client_python: str, tmp_path: Path, family: str
):
    """Of shades that it was not trained on."""
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {"LOOPS_BASE_URL": seeing.gateway.url, "BASETEN_API_KEY": KEY, "WANDB_MODE": "disabled"}
    env |= {"HF_ENDPOINT": f"{seeing.gateway.url}/hf", "HF_HOME": str(tmp_path / "hub")}
    options = ["--base-model", f"tiny/{family}", "--steps", "30", "--shades", "2", "--learning-rate", "0.02"]
    script = [client_python, str(REPO / "examples" / "vision.py"), *options]
    done = subprocess.run(script, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{seeing.gateway.log}"
    assert done.stdout.splitlines()[-1] == "4 of 4 right", done.stdout

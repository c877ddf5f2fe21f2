"""The official client's ``forward_backward_custom`` with an arbitrary PyTorch loss."""

import json
import subprocess
from pathlib import Path

import pytest

from gateway import KEY, Gateway, environment

SCRIPT = Path(__file__).parent / "scripts" / "custom_loss_checks.py"

pytestmark = pytest.mark.clients


def test_any_torch_loss_trains(torch_client_python: str, gateway: Gateway, tmp_path: Path):
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {"LOOPS_BASE_URL": gateway.url, "BASETEN_API_KEY": KEY, "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [torch_client_python, str(SCRIPT)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr}\n{gateway.log}"
    said = json.loads(done.stdout.splitlines()[-1])
    by_hand, through_the_client = said["grad_norms"]
    assert through_the_client == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 0
    losses = said["losses"]
    assert losses[-1] < 0.2 * losses[0]

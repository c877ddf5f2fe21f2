"""The cookbook downloads weights, decrypts them, and merges them into the base model."""

import json
import subprocess
from pathlib import Path

import pytest
from test_tinker_cookbook import Cookbook
from tinker_exit import ended_well

from gateway import Gateway

SCRIPT = Path(__file__).parent / "scripts" / "tinker_weights_checks.py"

pytestmark = pytest.mark.clients


def test_weights_are_downloaded_and_merged(
    cookbook_python: str,
    gateway: Gateway,
    tiny_model_folder: Path,
    tmp_path: Path,
):
    """The passing export is encrypted to the client's key and gone afterwards; the merged model computes the same."""
    env = Cookbook(cookbook_python, gateway, tmp_path).environment
    command = [cookbook_python, str(SCRIPT), str(tiny_model_folder), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert ended_well(done.returncode), f"{done.stderr[-3000:]}\n{gateway.log[-3000:]}"
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["files"] == [["adapter_config.json", "adapter_model.safetensors"]] * 2
    assert report["same"]
    assert "external_weights/e" in report["left"]
    assert "external_weights/download" not in report["left"]
    assert report["difference"] < 1e-3 < report["effect"]
    assert "adapter_model.safetensors" in report["peft"]

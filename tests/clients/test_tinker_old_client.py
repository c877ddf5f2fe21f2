"""The basic loop of an older ``tinker`` SDK, 0.25, against a real gateway and worker."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from tinker_exit import ended_well

from gateway import KEY, REPO, Gateway, environment

pytestmark = pytest.mark.clients

SCRIPT = Path(__file__).parent / "scripts" / "tinker_old_loop.py"
TOKENS = [5, 90, 40, 33, 77, 12, 60]


def test_the_basic_loop(gateway: Gateway, tmp_path: Path):
    python = os.environ.get("SELFLOOP_TINKER_PYTHON", str(REPO / ".venv-tinker" / "bin" / "python"))
    sdk = Path(os.environ.get("SELFLOOP_TINKER_OLD", str(REPO / ".venv-tinker" / "old")))
    if not (Path(python).exists() and (sdk / "tinker").is_dir()):
        missing = (
            "no tinker SDK 0.25: `make setup` puts one in .venv-tinker/old; or name its folder in SELFLOOP_TINKER_OLD"
        )
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    env = environment() | {
        "PYTHONPATH": str(sdk),
        "TINKER_BASE_URL": gateway.url,
        "TINKER_API_KEY": f"tml-{KEY}",
        "TINKER_TELEMETRY": "0",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [python, str(SCRIPT)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended_well(done.returncode), f"{done.stderr}\n{gateway.log}"
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["version"].startswith("0.25.")
    assert report["model"] == "tiny/llama"
    assert report["losses"][-1] < 0.5 * report["losses"][0]
    assert report["tokens"] == TOKENS[1:]
    assert report["sampled"] == pytest.approx(report["loaded"], abs=1e-4)
    assert report["state"].endswith("/weights/old")
    assert report["named"].endswith("/sampler_weights/named")

"""The official client goes on from an adapter that the PEFT library made."""

import json
import subprocess
import warnings
from pathlib import Path

import pytest

from gateway import KEY, Gateway, environment, selfloop, words

SCRIPT = Path(__file__).parent / "scripts" / "imported_checks.py"

pytestmark = pytest.mark.clients


def test_the_official_client_goes_on_from_an_imported_adapter(
    client_python: str, gateway: Gateway, tiny_model_folder: Path, tmp_path: Path
):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import served_model

    adapter = served_model.save_adapter(tiny_model_folder, tmp_path / "adapter")
    uri = selfloop("import", str(adapter), "--data-dir", str(gateway.data_dir)).strip()
    tokens = words(99)
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {"LOOPS_BASE_URL": gateway.url, "BASETEN_API_KEY": KEY, "WANDB_MODE": "disabled"}
    command = [client_python, str(SCRIPT), uri, json.dumps(tokens)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{gateway.log}"
    said = json.loads(done.stdout.splitlines()[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    assert said["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert said["losses"][1] < said["losses"][0]
    assert "load its weights alone" in said["refusal"]

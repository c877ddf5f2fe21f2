"""``selfloop models fit``: what it prints, and when it fails."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2]))

from selfloop.cli.main import app
from selfloop.control.queue.run_memory import bytes_open, needed

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["models", "fit", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_a_config_alone_fits_and_every_line_is_short(config: Path):
    status, text = run(config, "--memory", "1GiB", "--device", "cpu")
    assert status == 0
    assert "config.json: fits" in text
    assert "256 of 256 tokens" in text
    lines = text.splitlines()[1:]  # the first has the path
    assert max(map(len, lines)) <= 80


def test_json_has_the_figures_of_control_and_engine(config: Path):
    status, text = run(config, "--memory", "1GiB", "--rank", 8, "--context", 100, "--json", "--dtype", "float32")
    found = json.loads(text)
    assert status == 0
    assert found["fits"] is True
    num_bytes = bytes_open(found["fit"]["adapter_parameters"])
    assert found["run"]["open_bytes"] == num_bytes
    assert found["run"]["needed_bytes"] == needed([num_bytes])
    assert found["fit"]["plan"]["pass_tokens"] == 100


def test_what_does_not_fit_ends_in_1_and_says_what_helps(config: Path):
    status, text = run(config, "--memory", "0.002GiB", "--device", "cpu")
    assert status == 1
    assert "does not fit" in text
    assert "--activation-memory" in text


def test_what_is_missing_is_named(tmp_path: Path):
    status, text = run(tmp_path)
    assert status == 1
    assert "has no config.json" in text
    status, text = run("no/such-model", "--data-dir", tmp_path / "data")
    assert status == 1
    assert "no/such-model" in text
    assert run(tmp_path, "--memory", "much")[0] == 2


def test_without_a_model_the_catalogue_is_a_table(tmp_path: Path):
    status, text = run("--data-dir", tmp_path / "data")
    assert status == 0
    assert "HuggingFaceTB/SmolLM2-135M-Instr" in text
    assert "prepared at first use" in text

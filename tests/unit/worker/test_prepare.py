"""Preparing model folders: embedded, local, and from a hub (our own dialect of it, over a socket)."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from selfloop.server.hub import RealHub, router
from selfloop.types.errors import BadRequest
from selfloop.types.model_folder import ModelFacts, read_facts
from selfloop.worker import prepare

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def run(*args: str, **env: str) -> tuple[int, list[dict]]:
    command = [sys.executable, "-m", "selfloop.worker.prepare", *args]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {"model_type": "qwen2", "vocab_size": 3, "max_position_embeddings": 8, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({"model.norm.weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return folder


class Hub:
    serve_weights = True

    def __init__(self, folder: Path) -> None:
        self.path = folder

    async def folder(self, model_id: str) -> Path | None:
        return self.path if model_id == "org/tiny" else None


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    app = FastAPI()
    app.include_router(router(Hub(folder), RealHub(None)))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/hf"
        server.should_exit = True
        thread.join()


def test_a_local_folder_is_served_where_it_lies(folder: Path):
    before = sorted(folder.iterdir())
    code, lines = run("folder", str(folder))
    assert code == 0
    assert lines[-1]["stage"] == "done"
    assert lines[-1]["facts"]["path"] == str(folder)
    assert lines[-1]["facts"]["num_parameters"] == 4
    assert sorted(folder.iterdir()) == before


def test_a_refusal_is_one_json_line(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code, lines = run("folder", str(folder))
    assert code == 1
    assert "pytorch_model.bin" in lines[-1]["error"]


def test_a_tokenizer_that_cannot_be_converted_is_refused(folder: Path):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(BadRequest, match="tokenizer"):
        prepare.prepare_folder(folder, lambda stage, fraction: None)


def test_download_from_a_hub(hub: str, folder: Path, tmp_path: Path):
    target = tmp_path / "models" / "org--tiny"
    code, lines = run("hub", "org/tiny", str(target), HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "home"))
    assert code == 0, lines
    assert sorted(file.name for file in target.iterdir()) == sorted(file.name for file in folder.iterdir())
    assert lines[-1]["facts"]["model_type"] == "qwen2"
    assert [file.name for file in target.parent.iterdir() if file.name != ".org--tiny.lock"] == ["org--tiny"]


def test_hub_refusals(hub: str, folder: Path, tmp_path: Path):
    env = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}
    assert "no such model" in run("hub", "org/other", str(tmp_path / "x"), **env)[1][-1]["error"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    assert "'bert' is not supported" in run("hub", "org/tiny", str(tmp_path / "y"), **env)[1][-1]["error"]
    assert not (tmp_path / "y").exists()


def test_no_network(tmp_path: Path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    code, lines = run("hub", "org/tiny", str(tmp_path / "x"), **env)
    assert code == 1
    assert "hub cannot be reached for org/tiny" in lines[-1]["error"]
    assert not (tmp_path / "x").exists()


def test_a_half_folder_is_never_seen(folder: Path, tmp_path: Path):
    target = tmp_path / "served"

    def broken(staging: Path) -> None:
        (staging / "config.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepare._build(target, broken)
    assert not target.exists()
    with pytest.raises(BadRequest):
        prepare._build(target, lambda staging: None)
    assert not target.exists()

    def copy(staging: Path) -> None:
        for file in folder.iterdir():
            (staging / file.name).write_bytes(file.read_bytes())

    assert prepare._build(target, copy).path == target


def test_a_whole_folder_is_not_built_again(folder: Path):
    def never(staging: Path) -> None:
        raise AssertionError

    assert prepare._build(folder, never) == read_facts(folder)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    stages: list[tuple[str, float]] = []
    target = tmp_path_factory.mktemp("models") / "smollm2"
    facts = prepare.prepare_embedded(target, lambda stage, fraction: stages.append((stage, fraction)))
    assert [fraction for _, fraction in stages] == sorted(fraction for _, fraction in stages)
    return facts


@pytest.mark.smollm2
def test_embedded_facts(smollm2: ModelFacts):
    assert (smollm2.model_type, smollm2.vocab_size) == ("llama", 49152)
    assert (smollm2.max_position_embeddings, smollm2.num_parameters) == (8192, 134_515_008)
    assert smollm2.eos_token_ids == (2,)
    config = json.loads((smollm2.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100_000.0, 1e-5)


@pytest.mark.smollm2
@pytest.mark.parametrize(
    "text",
    [
        "12345 and 3.14, 2024's",
        "  lead  spaces\n\n\ttabs",
        "žluťoučký 日本語 🦜🏴‍☠️ ﬁ ½",
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_embedded_tokenizer_round_trips(smollm2: ModelFacts, text: str):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2]
    assert ids.count(2) == text.count("<|im_end|>")
    assert all(tokenizer.decode([i]) in "0123456789" for i in tokenizer("12345")["input_ids"])


@pytest.mark.smollm2
def test_embedded_model_answers(smollm2: ModelFacts):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.path)
    model = AutoModelForCausalLM.from_pretrained(smollm2.path)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

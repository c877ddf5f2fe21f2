"""An unmodified ``AutoTokenizer.from_pretrained`` against the hub dialect, over a real socket."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from selfloop.server.hub import Hub, RealHub, router

TEXT = ["the captain sails the old ship", "fair winds and following seas", "12 o'clock <|end|>"]

SCRIPT = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("the ship <|end|>")["input_ids"]
chat = tokenizer.apply_chat_template([{"role": "user", "content": "ship"}], tokenize=False)
print(json.dumps({"ids": ids, "text": tokenizer.decode(ids), "eos": tokenizer.eos_token_id, "chat": chat}))
"""


class Models:
    serve_weights = False

    def __init__(self, folder: Path) -> None:
        self.folder_of = {"org/name": folder, "alias": folder}

    async def folder(self, model_id: str) -> Path | None:
        return self.folder_of.get(model_id)

    async def pinned(self, model_id: str, revision: str) -> Path | None:
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def base_url(folder: Path) -> Iterator[str]:
    app = FastAPI()
    app.include_router(router)
    app.state.hub = Hub(Models(folder), RealHub(None))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("model_id", ["org/name", "alias"])
def test_auto_tokenizer(base_url: str, folder: Path, tmp_path: Path, model_id: str):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": f"{base_url}/hf", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, model_id]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ids"] == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the ship <|end|>").ids
    assert answer["text"] == "the ship <|end|>"
    assert answer["ids"][-1] == answer["eos"] == 0
    assert answer["chat"] == "[ship]"


def test_weights_are_not_served(base_url: str):
    response = httpx.get(f"{base_url}/hf/org/name/resolve/main/model.safetensors")
    assert (response.status_code, response.headers["X-Error-Code"]) == (404, "EntryNotFound")

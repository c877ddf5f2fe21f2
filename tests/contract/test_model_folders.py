"""Model folders that somebody else wrote, through the real server."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import safetensors.torch
import torch
from test_export_import import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from gateway import Gateway, selfloop

PROMPT = [65, 66, 67, 68, 69]


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A tied model with an output layer of its own, and a tokenizer that is not in the fast form."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "odd")
    configure(folder, tie_word_embeddings=True)
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def configure(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scored(http: httpx.Client, name: str) -> httpx.Response:
    body = {"model": name, "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    return http.post("/oai/api/v1/completions", json=body)


def test_an_odd_folder_is_served_as_transformers_reads_it(new_gateway: Callable[[], Gateway], folder: Path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    gateway = new_gateway()
    selfloop("models", "add", str(folder), "--name", "odd/model", "--data-dir", str(gateway.data_dir))
    http = gateway.http()
    answer = scored(http, "odd/model")
    assert answer.status_code == 200, answer.text
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        scores = model(torch.tensor([PROMPT[:-1]])).logits[0].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].tolist()
    assert answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    messages = [{"role": "user", "content": "Ahoy"}]
    chat = http.post("/oai/api/v1/chat/completions", json={"model": "odd/model", "messages": messages, "max_tokens": 2})
    theirs = AutoTokenizer.from_pretrained(folder)
    assert chat.json()["usage"]["prompt_tokens"] == len(
        theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    # What is converted is given out, too.
    served = http.get("/hf/odd/model/resolve/main/tokenizer.json").json()
    assert served["model"]["vocab"] == json.loads((folder / "vocab.json").read_text())


def test_a_folder_that_cannot_be_loaded_is_refused_when_it_is_added(data_template: Path, folder: Path, tmp_path: Path):
    data_dir = shutil.copytree(data_template, tmp_path / "data")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    own = {"v_head.summary.weight": torch.zeros(1, 64)}
    safetensors.torch.save_file(tensors | own, folder / "model.safetensors", metadata={"format": "pt"})
    said = refused("models", "add", str(folder), "--name", "odd/model", "--data-dir", str(data_dir))
    assert "v_head.summary.weight" in said
    assert "odd/model" not in selfloop("models", "list", "--data-dir", str(data_dir))


def test_a_folder_that_goes_bad_is_the_requests_fault_and_is_not_tried_again(
    new_gateway: Callable[[], Gateway], folder: Path
):
    gateway = new_gateway()
    selfloop("models", "add", str(folder), "--name", "odd/model", "--data-dir", str(gateway.data_dir))
    safetensors.torch.save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    http = gateway.http()
    for _ in range(2):
        answer = scored(http, "odd/model")
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_invalid")
        assert "has 1 tensors for 2 layers" in error["message"]
    message = {"model": "odd/model", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    answer = http.post("/anthropic/api/v1/messages", json=message, headers={"anthropic-version": "2023-06-01"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_template_that_eats_memory_and_a_token_that_the_model_has_not(
    new_gateway: Callable[[], Gateway], tiny_model_folder: Path, tmp_path: Path
):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "hungry")
    raw = json.loads((folder / "tokenizer.json").read_text())
    own = [raw["added_tokens"][0] | {"id": len(raw["model"]["vocab"]) + i, "content": f"<|own{i}|>"} for i in range(6)]
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"added_tokens": raw["added_tokens"] + own}))
    eats = "{% if messages[0].content == 'eat' %}{{ 'a' * 20000000000 }}{% endif %}{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(eats)
    gateway = new_gateway()
    selfloop("models", "add", str(folder), "--name", "hungry/model", "--data-dir", str(gateway.data_dir))
    http = gateway.http()

    def chat(content: str) -> httpx.Response:
        body = {"model": "hungry/model", "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
        return http.post("/oai/api/v1/chat/completions", json=body)

    assert chat("fine").status_code == 200
    worker = gateway.worker_pids()
    answer = chat("eat")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "256 MiB of memory" in answer.json()["error"]["message"]
    answer = chat("x <|own5|>")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content")
    assert "'<|own5|>': that is token 264" in answer.json()["error"]["message"]
    text = {"model": "hungry/model", "max_tokens": 1, "prompt": "x <|own5|>"}
    answer = http.post("/oai/api/v1/completions", json=text)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    assert chat("fine").status_code == 200
    assert gateway.worker_pids() == worker

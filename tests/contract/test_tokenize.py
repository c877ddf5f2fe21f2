"""vLLM's routes about text, of a sampler and of the whole server."""

import json
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from gateway import MODEL, Json, Run, ok

MESSAGES = [{"role": "user", "content": "say ä"}]


@pytest.fixture(scope="module")
def sampler(http: httpx.Client) -> str:
    return Run.create(http, seed=1).attached().resource["sampler"]["base_url"]


@pytest.fixture(scope="module", params=["whole", "sampler"])
def base(request: pytest.FixtureRequest, sampler: str) -> str:
    return {"whole": "", "sampler": sampler}[request.param]


@pytest.fixture(scope="module")
def tokenizer(http: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The same files, read by the library that others read them with."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        response = http.get(f"/hf/{MODEL}/resolve/main/{name}", follow_redirects=True)
        assert response.status_code == 200
        (folder / name).write_bytes(response.content)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_a_prompt(http: httpx.Client, base: str, tokenizer: PreTrainedTokenizerFast):
    answer = ok(http.post(f"{base}/tokenize", json={"model": MODEL, "prompt": "hä <|im_end|>"}))
    assert answer["tokens"] == tokenizer.encode("hä <|im_end|>")
    assert (answer["count"], answer["max_model_len"], answer["token_strs"]) == (len(answer["tokens"]), 256, None)
    shown = ok(http.post(f"{base}/tokenize", json={"model": MODEL, "prompt": "hä", "return_token_strs": True}))
    assert shown["token_strs"] == ["h", "bytes:\\xc3", "bytes:\\xa4"]
    text = ok(http.post(f"{base}/detokenize", json={"model": MODEL, "tokens": answer["tokens"]}))
    assert text == {"prompt": "hä <|im_end|>"}
    assert ok(http.post(f"{base}/tokenize", json={"model": MODEL, "prompt": ""}))["count"] == 0
    assert ok(http.post(f"{base}/detokenize", json={"model": MODEL, "tokens": []})) == {"prompt": ""}


def test_messages(http: httpx.Client, base: str, tokenizer: PreTrainedTokenizerFast):
    asked: Json = {"model": MODEL, "messages": MESSAGES}
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ok(http.post(f"{base}/tokenize", json=asked))["tokens"] == expected
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False, return_dict=False)
    assert ok(http.post(f"{base}/tokenize", json=asked | {"add_generation_prompt": False}))["tokens"] == expected
    tools = [{"type": "function", "function": {"name": "clock"}}]
    assert ok(http.post(f"{base}/tokenize", json=asked | {"tools": tools}))["count"] > len(expected)


def test_the_tokenizers_configuration(http: httpx.Client, base: str, tokenizer: PreTrainedTokenizerFast):
    params = {} if base else {"model": MODEL}
    info = ok(http.get(f"{base}/tokenizer_info", params=params))
    assert (info["tokenizer_class"], info["eos_token"]) == ("PreTrainedTokenizerFast", tokenizer.eos_token)
    assert info["chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("tokenize", {"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("tokenize", {"prompt": "a", "surprise": 1}, "surprise"),
        ("tokenize", {"prompt": "a", "chat_template": "{{ x }}"}, "chat_template"),
        ("tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("tokenize", {"messages": []}, "messages"),
        ("detokenize", {"tokens": [264]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {}, "tokens"),
    ],
)
def test_refused_by_name(http: httpx.Client, base: str, route: str, body: Json, field: str):
    response = http.post(f"{base}/{route}", json={"model": MODEL} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field, response.text


def test_a_model_is_named_where_there_are_several(http: httpx.Client):
    for response in (http.post("/tokenize", json={"prompt": "a"}), http.get("/tokenizer_info")):
        assert response.status_code == 400, response.text
        assert MODEL in json.dumps(response.json()["error"]["message"])
    assert http.post("/tokenize", json={"prompt": "a", "model": "nobody/nothing"}).status_code == 404


def test_the_routes_by_their_whole_paths(http: httpx.Client, sampler: str):
    """The whole server's lie under the base URLs of its other routes, too."""
    id = sampler.rsplit("/", 1)[1]
    body = {"model": MODEL, "prompt": "ab"}
    tokens = ok(http.post(f"/loops/samplers/{id}/tokenize", json=body))["tokens"]
    assert ok(http.post("/oai/api/tokenize", json=body))["tokens"] == tokens
    asked = {"model": MODEL, "tokens": tokens}
    assert ok(http.post(f"/loops/samplers/{id}/detokenize", json=asked)) == {"prompt": "ab"}
    assert ok(http.post("/oai/api/detokenize", json=asked)) == {"prompt": "ab"}
    info = ok(http.get("/oai/api/tokenizer_info", params={"model": MODEL}))
    assert ok(http.get(f"/loops/samplers/{id}/tokenizer_info")) == info

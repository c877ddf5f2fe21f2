"""Preparing model folders: embedded, local, and from a hub (our own dialect of it, over a socket)."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

import served_model
import tiny_models
from selfloop.convert import prepare
from selfloop.server import hub as hub_dialect
from selfloop.types.digests import MANIFEST_FILE, read_manifest
from selfloop.types.errors import BadRequest
from selfloop.types.model_folder import ModelFacts, computed_by, read_facts, tokenizer_files
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.types.model_weights import weight_names
from selfloop.worker.text.chat import ChatTemplate

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def run(*args: str, **env: str) -> tuple[int, list[dict]]:
    command = [sys.executable, "-m", "selfloop.convert.prepare", *args]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_folder, tmp_path / "tiny")


class Hub:
    serve_weights = True

    def __init__(self, folder: Path) -> None:
        self.path = folder

    async def folder(self, model_id: str) -> Path | None:
        return self.path if model_id == "org/tiny" else None

    async def pinned(self, model_id: str, revision: str) -> Path | None:
        return None


@pytest.fixture
def hub(folder: Path) -> Iterator[str]:
    app = FastAPI()
    app.include_router(hub_dialect.router)
    app.state.hub = hub_dialect.Hub(Hub(folder), hub_dialect.RealHub(None))
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
    assert lines[-1]["facts"]["vocab_size"] == served_model.VOCAB_SIZE
    assert sorted(folder.iterdir()) == before


def test_a_family_that_only_transformers_knows_is_admitted(folder: Path, tmp_path: Path):
    other = tiny_models.save("cohere2", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, other / name)
    facts = prepare.prepare_folder(other, None, lambda stage, fraction: None)
    assert (facts.model_type, facts.vocab_size) == ("cohere2", tiny_models.VOCAB_SIZE)
    assert computed_by(other) == "transformers (selfloop has no cohere2)"
    assert computed_by(folder) == "selfloop"


def test_a_refusal_is_one_json_line(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    code, lines = run("folder", str(folder))
    assert code == 1
    assert "pytorch_model.bin" in lines[-1]["error"]


def test_a_tokenizer_that_cannot_be_converted_is_refused(folder: Path):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(BadRequest, match="tokenizer"):
        prepare.prepare_folder(folder, folder.parent / "models", lambda stage, fraction: None)


def slow_tokenizer(folder: Path) -> Tokenizer:
    """Leave only vocabulary and merges, as older folders have them; gives what they mean to transformers."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(raw["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in raw["model"]["merges"]))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def merging(folder: Path) -> Path:
    """The tiny model with a tokenizer that merges."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"] |= {"he": 259, "Ġt": 260, "Ġthe": 261, "th": 262}
    raw["model"]["merges"] = [["h", "e"], ["Ġ", "t"], ["Ġt", "he"], ["t", "h"]]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


TEXT = "  The cat, the\n\thearth 12 <|im_start|>user žluťoučký 🦜<|endoftext|>"


def test_a_slow_tokenizer_is_converted_beside_the_folder(merging: Path, tmp_path: Path):
    expected = slow_tokenizer(merging)
    (merging / "additional_chat_templates").mkdir()
    (merging / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    before = {file.name: file.read_bytes() for file in merging.iterdir() if file.is_file()}
    code, lines = run("folder", str(merging), "--converted-into", str(tmp_path / "models"))
    assert code == 0, lines
    served = Path(lines[-1]["facts"]["path"])
    assert served.parent == tmp_path / "models"
    assert {file.name: file.read_bytes() for file in merging.iterdir() if file.is_file()} == before
    assert ModelTokenizer.load(served).encode(TEXT, add_special_tokens=False) == expected.encode(TEXT)
    assert AutoTokenizer.from_pretrained(served).encode(TEXT) == expected.encode(TEXT)
    assert 261 in expected.encode(TEXT)
    assert (served / "model.safetensors").resolve() == merging / "model.safetensors"
    assert ChatTemplate.load(served, ModelTokenizer.load(served))._templates["tool_use"] == "with tools"
    assert "tokenizer.json" in tokenizer_files(served)
    # The weights are the user's, who may change them.
    manifest = read_manifest(served)
    assert manifest is not None
    assert "tokenizer.json" in manifest
    assert "model.safetensors" not in manifest
    # The same folder again is the same model; another state of it is another.
    assert run("folder", str(merging), "--converted-into", str(tmp_path / "models"))[1][-1] == lines[-1]
    (merging / "chat_template.jinja").write_text("another")
    again = run("folder", str(merging), "--converted-into", str(tmp_path / "models"))[1][-1]["facts"]["path"]
    assert (Path(again) / "chat_template.jinja").read_text() == "another"


def test_a_slow_tokenizer_from_a_hub_is_converted(hub: str, merging: Path, tmp_path: Path):
    expected = slow_tokenizer(merging)
    target = tmp_path / "models" / "org--tiny"
    code, lines = run("hub", "org/tiny", str(target), HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "home"))
    assert code == 0, lines
    assert ModelTokenizer.load(target).encode(TEXT, add_special_tokens=False) == expected.encode(TEXT)


def test_the_weights_that_a_converted_folder_links_to_may_go(merging: Path, tmp_path: Path):
    slow_tokenizer(merging)
    served = prepare.prepare_folder(merging, tmp_path / "models", lambda stage, fraction: None).path
    shutil.rmtree(merging)
    with pytest.raises(BadRequest, match=r"link to .*tiny/model\.safetensors, which is gone"):
        read_facts(served)


def test_a_tokenizer_that_the_worker_cannot_read_is_refused(folder: Path, tmp_path: Path):
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer of" in run("folder", str(folder), "--converted-into", str(tmp_path))[1][-1]["error"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL)}, unk_token=SPECIAL[0]))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "have no known bytes" in run("folder", str(folder), "--converted-into", str(tmp_path))[1][-1]["error"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope scaling 'dynamic'"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive integer, is 0"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
    ],
)
def test_what_the_engine_cannot_load_is_refused(change: dict, reason: str, folder: Path, tmp_path: Path):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    code, lines = run("folder", str(folder), "--converted-into", str(tmp_path / "models"))
    assert code == 1
    assert reason in lines[-1]["error"]


def test_a_hub_repository_with_two_models_is_refused_before_its_weights_come(hub: str, folder: Path, tmp_path: Path):
    shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    names = {file.name: file.stat().st_size for file in folder.iterdir()}
    with pytest.raises(BadRequest, match="has both"):
        weight_names(folder, names)
    del names["model.safetensors"]
    assert weight_names(folder, names) == ["model-00001-of-00001.safetensors"]


def test_download_from_a_hub(hub: str, folder: Path, tmp_path: Path):
    target = tmp_path / "models" / "org--tiny"
    code, lines = run("hub", "org/tiny", str(target), HF_ENDPOINT=hub, HF_HOME=str(tmp_path / "home"))
    assert code == 0, lines
    ours = {file.name for file in target.iterdir()}
    assert ours == {file.name for file in folder.iterdir()} | {MANIFEST_FILE}
    assert lines[-1]["facts"]["model_type"] == "llama"
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

"""``selfloop export`` and ``selfloop import`` beside a server, and what the server makes of the import."""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import stores
from gateway import MODEL, Gateway, Run, copy_data, datum, environment, new_session, ok, selfloop, words


def refused(*arguments: str, code: int = 1) -> str:
    """Run a command that must fail; returns its stderr."""
    command = [sys.executable, "-m", "selfloop.cli.main", *arguments]
    env = environment() | stores.environment(Path(arguments[arguments.index("--data-dir") + 1]))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def adapter(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that the PEFT library made: rank 4, alpha 16, three of the seven projections."""
    import served_model

    return served_model.save_adapter(tiny_model_folder, tmp_path_factory.mktemp("adapter") / "somebodys")


def peft_logprobs(tiny_model_folder: Path, adapter: Path | None, tokens: list[int]) -> list[float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens[:-1]])).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def imported(gateway: Gateway, http: httpx.Client, adapter: Path) -> str:
    """The URI of the adapter, imported while the server runs."""
    return selfloop("import", str(adapter), "--data-dir", str(gateway.data_dir)).strip()


def test_a_run_goes_on_from_an_imported_adapter(http: httpx.Client, imported: str, tiny_model_folder: Path, adapter):
    run = Run.create(http, lora_rank=..., path=imported).attached()
    assert run.resource["lora_rank"] == 4
    expected = peft_logprobs(tiny_model_folder, adapter, words(99))
    assert run.logprobs() == pytest.approx(expected, abs=1e-4)
    assert peft_logprobs(tiny_model_folder, None, words(99)) != pytest.approx(expected, abs=1e-2)
    before = run.forward([datum(words(1))])["metrics"]
    run.train(1, 1, 1)
    assert run.forward([datum(words(1))])["metrics"]["loss"] < before["loss"]
    assert b'"lora_alpha": 16' in run.files(run.save("more"))["adapter_config.json"]


def test_the_weights_of_an_import_can_be_loaded_but_no_optimizer(http: httpx.Client, imported: str):
    run = Run.create(http, lora_rank=4).attached()
    run.do("load_state", path=imported)
    outcome = run.outcome(run.submit("load_state_with_optimizer", path=imported))
    assert outcome["status"] != "done"
    assert "load its weights alone" in str(outcome)


def test_an_adapter_of_zeros_is_reported_when_it_is_imported(gateway: Gateway, adapter: Path, tmp_path: Path):
    import safetensors.torch

    folder = shutil.copytree(adapter, tmp_path / "zeros")
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    zeros = {name: x * 0 if ".lora_B." in name else x for name, x in tensors.items()}
    printed: dict[str, str] = {}
    for name, content in (("zeros", zeros), ("trained", tensors)):
        safetensors.torch.save_file(content, file)
        command = [
            sys.executable,
            "-m",
            "selfloop.cli.main",
            "import",
            str(folder),
            "--data-dir",
            str(gateway.data_dir),
        ]
        env = environment() | stores.environment(gateway.data_dir)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
        assert done.stdout.startswith("bt://")
        printed[name] = done.stderr
    assert "it equals the base model: the adapter changes nothing" in printed["zeros"]
    assert "equals the base model" not in printed["trained"]


def test_an_import_is_seen_like_any_run(http: httpx.Client, other_team: httpx.Client, imported: str):
    (checkpoint,) = ok(http.get("/v1/loops/checkpoints", params={"checkpoint_path": imported}))["checkpoints"]
    run_id = imported.removeprefix("bt://loops:").partition("/")[0]
    run = ok(http.get(f"/v1/loops/runs/{run_id}"))["run"]
    assert (run["name"], run["status"]["name"], run["lora_rank"]) == ("somebodys", "INACTIVE", 4)
    assert run_id in [row["id"] for row in ok(http.get("/v1/loops/runs"))["runs"]]
    assert ok(http.get("/v1/loops/checkpoints", params={"run_id": run_id}))["checkpoints"] == [checkpoint]
    assert other_team.get(f"/v1/loops/runs/{run_id}").status_code == 404
    assert other_team.get(f"/v1/loops/checkpoints/{checkpoint['id']}/files").status_code == 404
    ok(http.post(f"/v1/loops/runs/{run_id}/deactivate"))
    # Its session's capacity cannot be reused, and it takes no operations.
    fresh = Run.create(http, new_session(http), lora_rank=..., path=imported, reuse_from_run_id=run_id)
    assert fresh.attached().resource["lora_rank"] == 4
    assert 400 <= Run(http, run).post("forward", data=[datum(words(1))], loss_fn="cross_entropy").status_code < 500


def test_an_import_outlives_the_server(new_gateway: Callable[[], Gateway], adapter: Path):
    gateway = new_gateway()
    uri = selfloop("import", str(adapter), "--name", "mine", "--data-dir", str(gateway.data_dir)).strip()
    gateway.kill()
    gateway.start()
    assert len(Run.create(gateway.http(), lora_rank=..., path=uri).attached().logprobs()) == len(words(99)) - 1


def test_an_import_into_a_directory_that_never_served(data_template: Path, adapter: Path, tmp_path: Path):
    data_dir = copy_data(data_template, tmp_path / "fresh")
    uri = selfloop("import", str(adapter), "--base-model", MODEL, "--data-dir", str(data_dir)).strip()
    gateway = Gateway(data_dir).start()
    try:
        assert Run.create(gateway.http(), lora_rank=..., path=uri).attached().logprobs()
    finally:
        gateway.close()


def test_refused_imports_leave_nothing(data_template: Path, adapter: Path, tmp_path: Path):
    data_dir = copy_data(data_template, tmp_path / "fresh")
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    where = ("--data-dir", str(data_dir))
    assert "cannot be read" in refused("import", str(broken), *where)
    assert "'tiny/other' not found" in refused("import", str(adapter), "--base-model", "tiny/other", *where)
    assert "team 'x' not found" in refused("import", str(adapter), "--team", "x", *where)
    assert "adapter_config.json" in refused("import", str(tmp_path), *where)
    config = broken / "adapter_config.json"
    config.write_text(config.read_text().replace(MODEL, "somebody/else"))
    error = refused("import", str(broken), *where)
    assert "somebody/else" in error
    assert "--base-model" in error
    assert list(stores.checkpoints(data_dir).glob("*")) == []
    listed = selfloop("runs", *where)
    assert "INACTIVE" not in listed


# -- export -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(http: httpx.Client) -> Run:
    run = Run.create(http).attached()
    run.train(1, 2, 3)
    return run


def test_a_trained_run_is_exported_both_ways(trained: Run, gateway: Gateway, tiny_model_folder: Path, tmp_path: Path):
    state, sampler = trained.save("state"), trained.save("sampler", "save_weights_for_sampler")
    expected = trained.logprobs()
    where = ("--data-dir", str(gateway.data_dir))
    merged, adapter = tmp_path / "new" / "merged", tmp_path / "adapter"
    adapter.mkdir()  # empty: may be filled
    assert str(merged) in selfloop("export", state, "--to", "merged", str(merged), *where)
    assert str(adapter) in selfloop("export", sampler, "--to", "peft", str(adapter), *where)
    assert peft_logprobs(merged, None, words(99)) == pytest.approx(expected, abs=1e-4)
    assert peft_logprobs(tiny_model_folder, adapter, words(99)) == pytest.approx(expected, abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "new"]
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]
    assert "exists already" in refused("export", state, "--to", "peft", str(adapter), *where)
    # What went out comes in again, and is served like the run that it came from.
    uri = selfloop("import", str(adapter), *where).strip()
    again = Run.create(trained.http, lora_rank=..., path=uri).attached()
    assert again.logprobs() == pytest.approx(expected, abs=1e-6)


def test_refused_exports_leave_nothing(trained: Run, gateway: Gateway, tmp_path: Path):
    where = ("--data-dir", str(gateway.data_dir))
    out = tmp_path / "out"
    unknown = f"bt://loops:{trained.id}/weights/never-saved"
    error = refused("export", unknown, "--to", "merged", str(out), *where)
    assert error == f"checkpoint '{unknown}' not found\n"
    assert "expected a checkpoint URI" in refused("export", "nonsense", "--to", "peft", str(out), *where)
    refused("export", unknown, "--to", "onnx", str(out), *where, code=2)
    refused("export", unknown, "--to", "gguf", "--dtype", "q4", str(out), *where, code=2)
    assert "dtype: " in refused("export", unknown, "--to", "merged", "--dtype", "f16", str(out), *where)
    torn = trained.save("torn")
    (checkpoint,) = ok(trained.http.get("/v1/loops/checkpoints", params={"checkpoint_path": torn}))["checkpoints"]
    stores.damage(gateway.data_dir, checkpoint["id"], "adapter_model.safetensors")
    assert "adapter_model.safetensors" in refused("export", torn, "--to", "merged", str(out), *where)
    assert list(tmp_path.iterdir()) == []


def test_a_trained_run_is_exported_as_gguf(new_gateway: Callable[[], Gateway], tmp_path: Path):
    """Of a model whose tokenizer can be written for llama.cpp."""
    import gguf_models

    gateway = new_gateway()
    model_dir = gguf_models.save("llama", tmp_path / "model")
    where = ("--data-dir", str(gateway.data_dir))
    selfloop("models", "add", str(model_dir), "--name", "tiny/gguf", *where)

    class OfThisModel(Run):
        def post(self, op: str, **body: object) -> httpx.Response:
            return super().post(op, **({"model": "tiny/gguf"} | body))

    run = OfThisModel.create(gateway.http(), base_model="tiny/gguf")
    run.do("init_trainer_server", lora_rank=8, base_model="tiny/gguf")
    tokens = [5 + i * i % 80 for i in range(12)]
    for _ in range(3):
        run.forward_backward([datum(tokens)])
        run.step()
    uri, expected = run.save("state"), run.logprobs(tokens)
    for dtype in ("f32", "f16"):
        said = selfloop("export", uri, "--to", "gguf", "--dtype", dtype, str(tmp_path / dtype), *where)
        assert str(tmp_path / dtype) in said
        assert gguf_logprobs(tmp_path / dtype, tokens) == pytest.approx(expected, abs=1e-4 if dtype == "f32" else 2e-2)
    assert gguf_logprobs(tmp_path / "f32", tokens) != gguf_logprobs(tmp_path / "f16", tokens)
    # What was written is a base model again.
    said = selfloop("models", "add", str(tmp_path / "f32" / "model.gguf"), "--name", "tiny/back", *where)
    assert "tiny/back is served" in said
    body = {"model": "tiny/back", "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = ok(gateway.http().post("/oai/api/v1/completions", json=body))
    assert answer["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)


def gguf_logprobs(folder: Path, tokens: list[int]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def test_a_tokenizer_that_llama_cpp_has_not(trained: Run, gateway: Gateway, tmp_path: Path):
    """The model that these tests serve has no merges: the refusal says so and nothing is left."""
    uri = trained.save("for-llama-cpp")
    error = refused("export", uri, "--to", "gguf", str(tmp_path / "out"), "--data-dir", str(gateway.data_dir))
    assert "without merges" in error
    assert list(tmp_path.iterdir()) == []

"""``selfloop.testing``: its members, its model, its server and the deaths of its workers."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfloop.testing
from gateway import Run, datum, ok, until, words
from selfloop.testing import Server, ServerFailed, make_tiny_model
from selfloop.testing.orders import Orders

MEMBERS = ["TINY_MODEL", "Server", "ServerFailed", "make_tiny_model", "server"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with selfloop.testing.server() as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
        yield client


def new_run(http: httpx.Client, model: str) -> Run:
    run = Run.create(http, base_model=model, lora_rank=4, seed=3)
    run.do("init_trainer_server", model=model, lora_rank=4, base_model=model)
    return run


def losses(run: Run, model: str, num_steps: int) -> list[float]:
    """Each step is on its way before the one before it is waited for."""
    found = []
    for _ in range(num_steps):
        ticket = run.submit("forward_backward", model=model, data=[datum(words(1))], loss_fn="cross_entropy")
        step = run.submit("optim_step", model=model, adam_params={"learning_rate": 1e-2})
        found.append(run.result(ticket)["loss"])
        run.result(step)
    return found


def test_exported_members():
    assert sorted(selfloop.testing.__all__) == sorted(MEMBERS)
    assert all(getattr(selfloop.testing, name).__doc__ or name.isupper() for name in MEMBERS)


def test_it_is_imported_without_the_engine_and_the_server():
    heavy = ["torch", "transformers", "numpy", "fastapi", "sqlalchemy", "tinker", "baseten"]
    program = (
        f"import sys, selfloop.testing, selfloop.testing.pytest_plugin; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_tiny_model_is_the_same_each_time_and_opens_with_transformers(tmp_path: Path):
    one, same, other = (make_tiny_model(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, same, other)]
    assert weights[0] == weights[1] != weights[2]
    model, loading = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(one)
    messages = [{"role": "user", "content": "Ahoy é"}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(tokens) == "<|im_start|>user\nAhoy é<|im_end|>\n<|im_start|>assistant\n"
    assert model(torch.tensor([tokens])).logits.isfinite().all()


def test_variables_for_both_clients(server: Server):
    assert server.env["LOOPS_BASE_URL"] == server.env["TINKER_BASE_URL"] == server.url
    assert server.env["TINKER_API_KEY"] == f"tml-{server.env['BASETEN_API_KEY']}"
    found = httpx.get(f"{server.env['HF_ENDPOINT']}/{server.model}/resolve/main/tokenizer_config.json")
    assert found.json() == json.loads((server.model_folder / "tokenizer_config.json").read_text())
    assert server.tokenizer().decode(server.tokenizer().encode("Ahoy é")) == "Ahoy é"


def test_a_worker_that_dies_at_a_step_changes_no_number(server: Server, http: httpx.Client):
    expected = losses(new_run(http, server.model), server.model, 5)
    assert expected[-1] < expected[0]
    dead = server.log.count("killed by SIGKILL")
    server.kill_worker(at_step=3)
    assert losses(new_run(http, server.model), server.model, 5) == expected
    assert server.log.count("killed by SIGKILL") > dead
    assert Orders(server.data_dir).is_last_step() is False, "the order is carried out once"


def test_the_worker_is_killed_now(server: Server, http: httpx.Client):
    run = new_run(http, server.model)
    before = losses(run, server.model, 2)
    server.kill_worker()
    assert losses(run, server.model, 1)[0] < before[-1], "it goes on from the weights it had"


def test_what_cannot_be_killed(tmp_path: Path):
    server = Server(tmp_path / "data", tmp_path, "none/yet", 1, "key")
    with pytest.raises(ValueError, match="no worker runs"):
        server.kill_worker()
    with pytest.raises(ValueError, match="at_step: 1 or more, got 0"):
        server.kill_worker(at_step=0)


def test_orders_count_steps(tmp_path: Path):
    orders = Orders(tmp_path)
    assert not orders.is_last_step()
    orders.kill_after(2)
    assert [orders.is_last_step() for _ in range(3)] == [False, True, False]


def test_a_model_that_cannot_be_served_is_said(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ServerFailed, match="safetensors"), selfloop.testing.server(model=folder):
        pytest.fail("it started")


def test_nothing_is_left(server: Server):
    with selfloop.testing.server(name="my/name") as other:
        headers = {"Authorization": f"Bearer {other.api_key}"}
        assert other.url != server.url
        supported = ok(httpx.get(f"{other.url}/v1/loops/capabilities", headers=headers))["supported_models"]
        assert "my/name" in [model["model_name"] for model in supported]
        processes = [p for p in psutil.process_iter() if _is_of(p, other.data_dir)]
        assert processes
    assert not other.data_dir.parent.exists()
    until(lambda: not any(p.is_running() for p in processes), "its processes have ended", 20)


def _is_of(process: psutil.Process, data_dir: Path) -> bool:
    try:
        return any(str(data_dir) in part for part in process.cmdline())
    except psutil.Error:
        return False


def test_it_ends_with_the_process_that_started_it():
    program = (
        "import os, selfloop.testing as t\n"
        "with t.server() as s:\n"
        "    print(s.url, s.data_dir, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    url, data_dir = done.stdout.split()
    assert done.returncode == -9

    def is_gone() -> bool:
        try:
            httpx.get(f"{url}/healthz", timeout=1)
        except httpx.TransportError:
            return True
        time.sleep(0.1)
        return False

    until(is_gone, "the server has ended", 30)
    assert data_dir

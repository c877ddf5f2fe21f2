"""The first steps of both services with their own model names, on a model of that family under that very name.

No alias: a folder of the family is added by name, and clients get the tokenizer from the server.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from tinker_exit import ended_well

from gateway import KEY, REPO, Gateway, Run, datum, environment, ok, selfloop

SCRIPTS = Path(__file__).parent / "scripts" / "quickstarts"
LOOPS_MODEL, TINKER_MODEL, COOKBOOK_MODEL = "Qwen/Qwen3.5-2B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B-Base"

pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    import qwen3_5_model  # torch and transformers, only for those who serve it

    folder = tmp_path_factory.mktemp("qwen3_5")
    model = qwen3_5_model.save(folder / "model")
    for name in (LOOPS_MODEL, TINKER_MODEL, COOKBOOK_MODEL):
        selfloop("models", "add", str(model), "--name", name, "--data-dir", str(folder / "data"))
    gateway = Gateway(folder / "data").start()
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def tinker_python() -> str:
    for candidate in (os.environ.get("SELFLOOP_TINKER_PYTHON"), str(REPO / ".venv-tinker" / "bin" / "python")):
        if candidate and Path(candidate).exists():
            return candidate
    missing = "no tinker SDK: `make setup` makes one in .venv-tinker; or name a Python in SELFLOOP_TINKER_PYTHON"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def variables(gateway: Gateway, folder: Path) -> dict[str, str]:
    """What a user sets, and a home without anything in it."""
    kept = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    return kept | {
        "LOOPS_BASE_URL": gateway.url,
        "BASETEN_API_KEY": KEY,
        "TINKER_BASE_URL": gateway.url,
        "TINKER_API_KEY": f"tml-{KEY}",
        "HF_ENDPOINT": f"{gateway.url}/hf",
        "HF_HOME": str(folder / "hf"),
        "HOME": str(folder),
        "TINKER_TELEMETRY": "0",
        "WANDB_MODE": "disabled",
    }


def run(gateway: Gateway, folder: Path, *command: str) -> str:
    """A script to its end, in a folder of its own; returns what it printed."""
    env = variables(gateway, folder)
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert ended_well(done.returncode), f"{done.stdout[-2000:]}{done.stderr[-6000:]}\n{gateway.log[-3000:]}"
    return done.stdout + done.stderr


def reported(gateway: Gateway, folder: Path, python: str, script: str) -> dict[str, Any]:
    lines = run(gateway, folder, python, str(SCRIPTS / script)).splitlines()
    (report,) = [line for line in lines if line.startswith('{"')]
    return json.loads(report)


def test_the_loops_quickstart(served: Gateway, client_python: str, tmp_path: Path):
    report = reported(served, tmp_path, client_python, "loops.py")
    assert report["prompt"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert len(set(report["specials"])) == 4
    assert None not in report["specials"]
    assert report["losses"][-1] < 0.2 * report["losses"][0]
    assert report["text"] == "Paris."
    assert report["saved"].startswith("bt://loops:")
    assert report["checkpoints"] == report["over_http"] == ["quickstart", "step-1"]
    assert report["base_models"] == [LOOPS_MODEL]
    assert report["status"] == "INACTIVE"


def test_the_first_steps_of_tinker(served: Gateway, tinker_python: str, tmp_path: Path):
    report = reported(served, tmp_path, tinker_python, "tinker_first.py")
    assert TINKER_MODEL in report["models"]
    assert len(report["before"]) == 3
    assert all(num_tokens == num_logprobs > 0 for num_tokens, num_logprobs in report["before"])
    assert report["losses"][-1] < 0.2 * report["losses"][0]
    assert [text.strip() for text in report["after"]] == ["ip-shay"] * 2


def test_qwen3_5_through_the_cookbooks_renderer(served: Gateway, cookbook_python: str, tmp_path: Path):
    """A thought and a tool call, from its supervised examples into the weights and back through its parser."""
    report = reported(served, tmp_path, cookbook_python, "cookbook_renderer.py")
    assert report["renderer"] == "qwen3_5"
    assert report["losses"][-1] < 0.05 * report["losses"][0]
    thought, call = report["read"]
    assert thought == {
        "content": [{"type": "thinking", "thinking": "One and one."}, {"type": "text", "text": "Two."}],
        "calls": [],
        "clean": True,
    }
    assert (call["calls"], call["clean"]) == ([["look_up", {"city": "Paris", "days": 2}]], True)
    assert report["ours"] == report["theirs"], "the served template and the renderer write one prompt"


def test_the_cookbooks_first_loop_as_it_is(served: Gateway, cookbook_python: str, tmp_path: Path):
    """Its minimal supervised script with the model that it names; only the batch is smaller than its own."""
    data = tmp_path / "HuggingFaceH4" / "no_robots"
    data.mkdir(parents=True)
    rows = [
        [{"role": "user", "content": f"Who keeps light {i}?"}, {"role": "assistant", "content": "The captain."}]
        for i in range(64)
    ]
    (data / "train.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    module = "tinker_cookbook.recipes.sl_loop"
    run(served, tmp_path, cookbook_python, "-m", module, "log_path=log", "batch_size=4", "learning_rate=5e-3")
    found = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_mean_nll"] for row in found if "train_mean_nll" in row]
    assert len(losses) == 16
    assert losses[-1] < 0.5 * losses[0]
    last = json.loads((tmp_path / "log" / "checkpoints.jsonl").read_text().splitlines()[-1])
    assert last["name"] == "final"
    assert last["sampler_path"].startswith("tinker://")


def test_a_call_with_a_tag_for_each_parameter_reaches_the_openai_client(served: Gateway):
    """Taught with prompts from the server, in the form of the served template; ``auto`` by default."""
    http = served.http()
    look_up = {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    asked: dict[str, Any] = {
        "model": TINKER_MODEL,
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [look_up],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    prompt = ok(http.post("/tokenize", json=asked))["tokens"]
    call = "<tool_call>\n<function=look_up>\n<parameter=city>\n1\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    text = f"{call}</function>\n</tool_call><|im_end|>"
    answer = ok(http.post("/tokenize", json={"model": TINKER_MODEL, "prompt": text, "add_special_tokens": False}))
    example = datum((prompt + answer["tokens"])[:-1], [-100] * (len(prompt) - 1) + answer["tokens"])
    own = Run.create(http, base_model=TINKER_MODEL, lora_rank=16, seed=1)
    own.do("init_trainer_server", model=TINKER_MODEL, base_model=TINKER_MODEL, lora_rank=16)
    for _ in range(30):
        own.do("forward_backward", model=TINKER_MODEL, data=[example], loss_fn="cross_entropy")
        own.do("optim_step", model=TINKER_MODEL, adam_params={"learning_rate": 5e-3})
    path = own.do("save_weights_for_sampler", model=TINKER_MODEL, name="calls")["path"]
    with OpenAI(base_url=f"{served.url}/oai/api/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        answered = client.chat.completions.create(
            model=path,
            messages=asked["messages"],
            tools=[look_up],
            temperature=0,
            max_tokens=100,
            extra_body={"chat_template_kwargs": asked["chat_template_kwargs"]},
        )
    (choice,) = answered.choices
    (made,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (made.function.name, json.loads(made.function.arguments)) == ("look_up", {"city": "1", "days": 2})

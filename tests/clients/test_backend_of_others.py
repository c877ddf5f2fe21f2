"""Clients of other services with this server behind them, by the examples that a reader copies."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import selfloop.testing
from gateway import REPO, environment
from selfloop.testing import Server

EXAMPLES = REPO / "examples" / "backends"
PAGE = REPO / "docs" / "other-clients.md"
SAID = {
    "anthropic_client": r"\d+ tokens, (max_tokens|end_turn)\n\d+ pieces",
    "instructor_client": r"legs=[2468] can_fly=(True|False)",
    "langchain_client": r"(length|stop)\nlegs=[2468] can_fly=(True|False)",
    "litellm_client": r"\d+ tokens, (length|stop)\n\d+ pieces",
    "llm_client": r"\d+ bytes answered",
    "openai_agents_client": r"1 answer, \d+ tokens",
    "openai_client": r"legs: -?\d+\n\d+ pieces",
    "pydantic_ai_client": r"legs=[2468] can_fly=(True|False)",
}
COMPARED = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
folder, model, url = sys.argv[1:]
pairs = [("one two three", " four five"), ("two", " one three one two"), ("five four", " three")]
asked = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]
address = url + "/v1/completions"
ours = LocalCompletionsAPI(model=model, base_url=address, tokenizer=folder, tokenizer_backend="huggingface")
theirs = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1)
print(json.dumps([lm.loglikelihood(asked) for lm in (ours, theirs)]))
"""


@pytest.fixture(scope="module")
def python() -> str:
    """A Python that has them all."""
    found = os.environ.get("SELFLOOP_BACKENDS_PYTHON", str(REPO / ".venv-backends" / "bin" / "python"))
    if not Path(found).exists():
        missing = "no clients of other services: `make setup` puts them in .venv-backends"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with selfloop.testing.server() as started:
        yield started


def run(command: list[str], folder: Path, **more: str) -> str:
    # The embedded model's package, which that environment shares with ours, is a plugin of `llm` that wants llama.cpp.
    given = environment(HF_HOME=str(folder / "hf"), LLM_LOAD_PLUGINS="", **more)
    env = {name: value for name, value in given.items() if "proxy" not in name.lower()}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_example(name: str, python: str, server: Server, folder: Path) -> str:
    script = str(EXAMPLES / f"{name}.py")
    command = [sys.executable, "-m", "selfloop.cli.main", "exec", "--url", server.url, "--python", python]
    return run([*command, script, server.model], folder, SELFLOOP_API_KEY=server.api_key)


def test_every_example_is_run_and_told_with_its_version():
    examples = {path.stem for path in EXAMPLES.glob("*_client.py")}
    assert examples == {*SAID, "lm_eval_client"}
    pins = dict(
        line.split("==") for line in (REPO / "requirements" / "backends.txt").read_text().split("\n") if "==" in line
    )
    rows = re.findall(r"^\| `([\w-]+)` ([\d.]+) \|.*`examples/backends/(\w+)\.py`", PAGE.read_text(), re.MULTILINE)
    assert {stem for _, _, stem in rows} == examples
    assert {name: version for name, version, _ in rows} == {name: pins[name] for name, _, _ in rows}


@pytest.mark.parametrize("name", SAID)
def test_an_example_works_by_copy_and_paste(name: str, python: str, server: Server, tmp_path: Path):
    assert re.fullmatch(SAID[name], run_example(name, python, server, tmp_path))


def test_the_harness_compares_sentences(python: str, server: Server, tmp_path: Path):
    lines = run_example("lm_eval_client", python, server, tmp_path).splitlines()[-2:]
    assert [bool(re.search(r"-\d+\.\d{6}  [<>]  ", line)) for line in lines] == [True, True]


def test_the_harness_finds_what_it_finds_in_the_model_itself(python: str, server: Server, tmp_path: Path):
    """In float32, to rounding: its own code for transformers beside this server."""
    command = [python, "-c", COMPARED, str(server.model_folder), server.model, server.url]
    said = run(command, tmp_path, OPENAI_API_KEY=server.api_key, HF_HUB_OFFLINE="1")
    ours, theirs = json.loads(said.splitlines()[-1])
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    assert [logprob for logprob, _ in ours] == pytest.approx([logprob for logprob, _ in theirs], rel=5e-7)

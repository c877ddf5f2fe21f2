"""``selfloop exec``: scripts of either client find the server without a line of their own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import KEY, MODEL, REPO, Gateway, environment

SHOW = "import os, sys; print(sys.argv[1:], os.environ['LOOPS_BASE_URL'], os.environ['NO_PROXY']); sys.exit(5)"
LOOPS = f"""
from baseten.loops import ServiceClient
print("trains", ServiceClient().create_lora_training_client(base_model={MODEL!r}, rank=4).get_tokenizer().eos_token)
"""
TINKER = f"""
import os, tinker
trainer = tinker.ServiceClient().create_lora_training_client(base_model={MODEL!r}, rank=4)
print("trains", trainer.get_tokenizer().eos_token, flush=True)
os._exit(0)  # threads of the SDK at times abort its interpreter at the very end
"""


def run(folder: Path, gateway: Gateway, text: str, *before: str, **env: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(text)
    given = {"SELFLOOP_API_KEY": KEY, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}
    variables = {name: value for name, value in environment(**given | env).items() if "proxy" not in name.lower()}
    command = [
        sys.executable,
        "-m",
        "selfloop.cli.main",
        "exec",
        "--url",
        gateway.url,
        *before,
        str(script),
        "--a",
        "b",
    ]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


def test_the_script_has_its_arguments_and_its_status(gateway: Gateway, tmp_path: Path):
    done = run(tmp_path, gateway, SHOW, "--python", sys.executable)
    assert done.stdout == f"['--a', 'b'] {gateway.url} 127.0.0.1,localhost,::1\n"
    assert done.returncode == 5


@pytest.mark.parametrize(
    ("options", "env", "said"),
    [
        (["--python", sys.executable, "--url", "http://127.0.0.1:9"], {}, "no server answers at http://127.0.0.1:9"),
        (["--python", sys.executable], {"SELFLOOP_API_KEY": "slk-wrong"}, "key"),
        (["--python", "/no/such/python"], {}, "--python: a Python that runs; /no/such/python: No such file"),
    ],
)
def test_a_script_that_could_do_nothing_is_not_started(gateway: Gateway, tmp_path: Path, options, env, said):
    done = run(tmp_path, gateway, SHOW, *options, **env)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert said in line


def test_the_chat_libraries_of_others_are_pointed_here_unless_they_have_a_service(gateway: Gateway, tmp_path: Path):
    """A key of the real service is neither replaced nor sent to this server's address."""
    show = "import os; print({name: value for name, value in os.environ.items() if name[:4] in ('OPEN', 'ANTH')})"
    done = run(tmp_path, gateway, show, "--python", sys.executable, OPENAI_API_KEY="theirs")
    assert ast.literal_eval(done.stdout) == {
        "OPENAI_API_KEY": "theirs",
        "ANTHROPIC_BASE_URL": gateway.url,
        "ANTHROPIC_API_KEY": KEY,
    }


@pytest.mark.clients
def test_the_loops_client_is_found(gateway: Gateway, client_python: str, tmp_path: Path):
    """By itself, where `make setup` made its environment."""
    found = [] if (REPO / ".venv-client").exists() else ["--python", client_python]
    done = run(tmp_path, gateway, LOOPS, *found)
    assert done.stdout == "trains <|im_end|>\n", done.stderr


@pytest.mark.clients
def test_the_tinker_client(gateway: Gateway, cookbook_python: str, tmp_path: Path):
    done = run(tmp_path, gateway, TINKER, "--python", cookbook_python, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    assert "trains <|im_end|>" in done.stdout, done.stderr


def test_commands_are_completed():
    """As the shell asks for it once ``selfloop --install-completion`` was run."""
    asked = {"_SELFLOOP_COMPLETE": "complete_bash", "COMP_WORDS": "selfloop e", "COMP_CWORD": "1"}
    program = "from selfloop.cli.main import app; app(prog_name='selfloop')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(**asked), capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["export", "exec"], done.stderr

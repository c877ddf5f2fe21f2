"""The ``tinker`` command line of the official SDK against a real gateway and worker."""

import json
import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fake_hub
import pytest
from tinker_exit import ended_well

from gateway import KEY, MODEL, Gateway, environment

pytestmark = pytest.mark.clients

# What each command is tested by; a command that a later SDK has is missing here and fails the test.
COMMANDS = {
    "auth login": "test_auth_login_and_logout",
    "auth logout": "test_auth_login_and_logout",
    "auth status": "test_auth_status",
    "auth whoami": "test_auth_whoami",
    "billing checkpoint-storage": "test_billing",
    "billing usage": "test_billing",
    "checkpoint delete": "test_checkpoints_are_deleted",
    "checkpoint download": "test_a_checkpoint_is_downloaded",
    "checkpoint info": "test_checkpoints_are_shown",
    "checkpoint list": "test_checkpoints_are_shown",
    "checkpoint publish": "test_a_checkpoint_is_published",
    "checkpoint push-hf": "test_a_checkpoint_is_pushed_to_a_hub",
    "checkpoint set-ttl": "test_a_checkpoint_gets_a_time_to_live",
    "checkpoint unpublish": "test_a_checkpoint_is_published",
    "model list": "test_models",
    "run info": "test_runs",
    "run list": "test_runs",
    "session export-trace": "test_a_session_is_exported",
    "version": "test_version",
}
LIST = """
import click, json
from tinker.cli.__main__ import main_cli
def walk(command, name):
    if not isinstance(command, click.Group):
        return [name]
    context = click.Context(command)
    below = [(command.get_command(context, each), f"{name} {each}".strip()) for each in command.list_commands(context)]
    return [found for each, path in below for found in walk(each, path)]
print(json.dumps(walk(main_cli, "")))
"""
TRAIN = """
import numpy as np, tinker
from tinker import types
service = tinker.ServiceClient()
client = service.create_lora_training_client("tiny/llama", rank=4, user_metadata={"who": "cli"}).result()
tokens = list(range(5, 21))
targets = types.TensorData.from_numpy(np.array(tokens[1:], dtype=np.int64))
datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets})
client.forward_backward([datum], "cross_entropy").result()
client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
names = ("kept", "shown", "gone-1", "gone-2", "gone-3")
paths = {name: client.save_state(name).result().path for name in names}
paths["external"] = client.save_weights_external("out").result().path
print(client.model_id, *(f"{name}={path}" for name, path in paths.items()))
"""


@dataclass
class Tinker:
    """Runs commands; ``run`` and ``paths`` are of what was trained for them."""

    python: str
    env: dict[str, str]
    folder: Path
    run: str = ""
    paths: dict[str, str] | None = None

    def done(self, *arguments: str, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        command = [self.python, "-m", "tinker.cli", *arguments]
        return subprocess.run(
            command,
            env=self.env | env,
            cwd=self.folder,
            input=given,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def text(self, *arguments: str, given: str = "") -> str:
        done = self.done(*arguments, given=given)
        assert ended_well(done.returncode), f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def json(self, *arguments: str) -> dict[str, object]:
        return json.loads(self.text("--format", "json", *arguments))

    def path(self, name: str) -> str:
        assert self.paths is not None
        return self.paths[name]


@pytest.fixture(scope="module")
def tinker(tinker_python: str, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Tinker:
    folder = tmp_path_factory.mktemp("tinker-cli")
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    env |= {
        "TINKER_BASE_URL": gateway.url,
        "TINKER_API_KEY": f"tml-{KEY}",
        "TINKER_TELEMETRY": "0",
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "300",
    }
    made = subprocess.run(
        [tinker_python, "-c", TRAIN], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended_well(made.returncode), made.stderr
    run, *paths = made.stdout.split()
    return Tinker(tinker_python, env, folder, run, dict(path.split("=", 1) for path in paths))


def test_every_command_is_tested(tinker: Tinker):
    listed = subprocess.run([tinker.python, "-c", LIST], env=tinker.env, capture_output=True, text=True, check=True)
    assert sorted(json.loads(listed.stdout)) == sorted(COMMANDS)
    assert set(COMMANDS.values()) <= set(globals())


def test_version(tinker: Tinker):
    assert "0.38.0" in tinker.text("version")


def test_auth_status(tinker: Tinker):
    assert tinker.text("auth", "status").split("\n")[:2] == ["Credentials available: yes", "Tinker accessible: yes"]
    refused = tinker.done("auth", "status", TINKER_API_KEY="tml-nobody")
    assert refused.returncode != 0
    assert "Tinker accessible: no" in refused.stdout


def test_auth_whoami(tinker: Tinker):
    printed = tinker.json("auth", "whoami")
    assert str(printed["user_urn"]).startswith("selfloop:key:")
    refused = tinker.done("auth", "whoami", TINKER_API_KEY="tml-nobody")
    assert refused.returncode != 0


def test_auth_login_and_logout(tinker: Tinker):
    """A key is checked and kept by the client alone; logging out leaves it valid here."""
    printed = tinker.text("auth", "login", given=f"tml-{KEY}\n")
    assert "Logged in as environment (default)" in printed
    without = {"TINKER_API_KEY": ""}
    assert "Already logged in" in tinker.done("auth", "login", given="x\n", **without).stderr
    assert "Removed credential 'environment'" in tinker.text("auth", "logout")
    refused = tinker.done("auth", "login", given="tml-nobody\n")
    assert refused.returncode != 0
    assert "not valid" in refused.stderr
    test_auth_status(tinker)


def test_models(tinker: Tinker):
    assert MODEL in tinker.text("model", "list")
    assert MODEL in str(tinker.json("model", "list"))


def test_runs(tinker: Tinker):
    listed = tinker.json("run", "list")
    assert tinker.run in str(listed)
    printed = tinker.json("run", "info", tinker.run)
    assert (printed["training_run_id"], printed["base_model"], printed["lora_rank"]) == (tinker.run, MODEL, 4)
    assert tinker.run in tinker.text("run", "info", tinker.run)
    assert tinker.run in tinker.text("run", "list", "--limit=0")
    gone = tinker.done("run", "info", "aaaaaaa:train:0")
    assert gone.returncode != 0
    assert "aaaaaaa" in gone.stderr


def test_checkpoints_are_shown(tinker: Tinker):
    for arguments in (("--run-id", tinker.run), ("--limit=0",)):
        listed = str(tinker.json("checkpoint", "list", *arguments))
        assert tinker.path("kept") in listed
        assert tinker.path("external") in listed
    info = tinker.json("checkpoint", "info", tinker.path("kept"))
    assert (info["tinker_path"], info["checkpoint_type"], info["public"]) == (
        tinker.path("kept"),
        "training",
        False,
    )
    assert tinker.path("kept") in tinker.text("checkpoint", "info", tinker.path("kept"))


def test_a_checkpoint_is_published(tinker: Tinker):
    path = tinker.path("shown")
    tinker.text("checkpoint", "publish", path)
    assert tinker.json("checkpoint", "info", path)["public"] is True
    tinker.text("checkpoint", "unpublish", path)
    assert tinker.json("checkpoint", "info", path)["public"] is False


def test_a_checkpoint_gets_a_time_to_live(tinker: Tinker):
    path = tinker.path("shown")

    def expiry() -> object:
        return tinker.json("checkpoint", "info", path).get("expires_at")

    tinker.text("checkpoint", "set-ttl", path, "--ttl", "7200")
    left = datetime.fromisoformat(str(expiry())) - datetime.now(UTC)
    assert timedelta(hours=1) < left <= timedelta(hours=2)
    tinker.text("checkpoint", "set-ttl", path, "--remove")
    assert expiry() is None


def test_checkpoints_are_deleted(tinker: Tinker):
    gone = [tinker.path(f"gone-{i}") for i in (1, 2)]
    assert "Deleted 2 checkpoint(s)" in tinker.text("checkpoint", "delete", *gone, "--yes")
    assert "Deletion cancelled" in tinker.text("checkpoint", "delete", tinker.path("gone-3"), given="n\n")
    left = tinker.text("checkpoint", "list", "--run-id", tinker.run)
    assert not any(path in left for path in gone)
    assert tinker.path("gone-3") in left
    again = tinker.json("checkpoint", "delete", gone[0], "--yes")
    assert again["deleted_count"] == 0
    assert gone[0] in str(again["failed"])


def test_a_checkpoint_is_downloaded(tinker: Tinker, gateway: Gateway):
    """A trained one by way of a passing export, which is gone afterwards; an external one as it is."""
    adapters = []
    for name in ("kept", "external"):
        path = tinker.path(name)
        printed = tinker.json("checkpoint", "download", path, "--output", "downloads")
        folder = tinker.folder / "downloads" / path.removeprefix("tinker://").replace("/", "_")
        assert Path(str(printed["destination"])).name == folder.name
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
        assert json.loads(files["adapter_config.json"])["r"] == 4
        adapters.append(files["adapter_model.safetensors"])
    assert adapters[0] == adapters[1]
    assert "/external_weights/download" not in tinker.text("checkpoint", "list", "--limit=0")
    sampler = tinker.done("checkpoint", "download", "tinker://x/sampler_weights/x")
    assert "cannot be downloaded" in sampler.stderr


def test_a_checkpoint_is_pushed_to_a_hub(tinker: Tinker):
    """To a hub of these tests: what arrives is the adapter of the download, with a model card that names it."""
    refused = tinker.done("checkpoint", "push-hf", tinker.path("kept"))
    assert "Not logged in" in refused.stderr
    with fake_hub.serving() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": fake_hub.TOKEN, "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        done = tinker.done("checkpoint", "push-hf", tinker.path("kept"), "--repo", "me/captain", **env)
        assert ended_well(done.returncode), done.stdout + done.stderr
    ((repo, _),) = hub.repos
    (files,) = hub.repos.values()
    assert repo == "me/captain"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert f"tinker_path: {tinker.path('kept')}" in files["README.md"].decode()
    config = json.loads(files["adapter_config.json"])
    assert (config["r"], config["base_model_name_or_path"]) == (4, MODEL)
    printed = tinker.json("checkpoint", "download", tinker.path("kept"), "--output", "pushed")
    (weights,) = Path(tinker.folder, str(printed["destination"])).glob("*.safetensors")
    assert files["adapter_model.safetensors"] == weights.read_bytes()


def test_a_session_is_exported(tinker: Tinker):
    session = tinker.run.split(":")[0]
    printed = tinker.json("session", "export-trace", session, "--output", "trace.json")
    trace = json.loads((tinker.folder / "trace.json").read_text())
    assert printed["file_size_bytes"] == os.path.getsize(tinker.folder / "trace.json")
    assert {"forward_backward", "optim_step"} <= {event["name"] for event in trace["traceEvents"]}


def test_billing(tinker: Tinker):
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = [(hour + timedelta(hours=h)).isoformat().replace("+00:00", "Z") for h in (-1, 1)]
    usage = tinker.json("billing", "usage", *window)
    session = tinker.run.split(":")[0]
    events = [e for e in usage["data"] if e["session_id"] == session]  # type: ignore[union-attr]
    tokens = sum(e["event_info"]["token_count"] for e in events if e["event_info"]["type"] == "training")
    assert tokens == 15
    assert usage["sessions"][session]  # type: ignore[index]
    assert "training" in tinker.text("billing", "usage", *window)
    storage = tinker.json("billing", "checkpoint-storage")
    assert sum(line["size_bytes"] for line in storage["data"]) > 0  # type: ignore[union-attr]
    assert "environment" in tinker.text("billing", "checkpoint-storage")

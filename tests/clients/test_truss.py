"""The official, unmodified ``truss`` command line against a real gateway: every command below ``truss loops``.

It reaches only a server on ``localhost:8000``, whose REST it calls by the name ``api.localhost``. Not every machine
knows that name, so a ``sitecustomize`` module gives it to the subprocess; users put it into /etc/hosts.
"""

import csv
import io
import json
import os
import pty
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from gateway import KEY, MODEL, Gateway, Run, copy_data, environment, ok, until

pytestmark = pytest.mark.clients

PORT = 8000
WIDTH = 160
Truss = Callable[..., str]

TRUSSRC = f"[local]\nremote_provider = baseten\nremote_url = http://localhost:{PORT}\napi_key = {KEY}\n"
RESOLVE = """
import socket
_known = socket.getaddrinfo
def getaddrinfo(host, *rest, **named):
    return _known("127.0.0.1" if host == "api.localhost" else host, *rest, **named)
socket.getaddrinfo = getaddrinfo
"""
COMMANDS = """
import json
import rich_click
from truss.cli.loops_commands import loops
def leaves(command, name):
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, [word for p in command.params if not isinstance(p, rich_click.Argument) for word in p.opts[:1]]
    for word, sub in (inner or {}).items():
        yield from leaves(sub, [*name, word])
print(json.dumps(list(leaves(loops, []))))
"""
OF_EVERY_COMMAND = {"--log", "--non-interactive"}


@pytest.fixture(scope="module")
def at_8000(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway where truss looks for one. Somebody else's server on that port is waited for, then named."""

    def free() -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", PORT))
            except OSError:
                return False
            return True

    until(free, f"port {PORT} is free (truss reaches no other; stop what listens there)", 120)
    own = Gateway(copy_data(data_template, tmp_path_factory.mktemp("truss") / "data"))
    own.port, own.url = PORT, f"http://127.0.0.1:{PORT}"
    yield own.start()
    own.close()


@pytest.fixture(scope="module")
def http(at_8000: Gateway) -> httpx.Client:
    return at_8000.http()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / ".trussrc").write_text(TRUSSRC)
    (home / "resolve").mkdir()
    (home / "resolve" / "sitecustomize.py").write_text(RESOLVE)
    return home


def variables(home: Path) -> dict[str, str]:
    return environment(HOME=str(home), COLUMNS=str(WIDTH), NO_COLOR="1", TERM="dumb") | {
        "PYTHONPATH": str(home / "resolve")
    }


@pytest.fixture(scope="module")
def truss(truss_command: Path, at_8000: Gateway, home: Path) -> Truss:
    """Runs a command to its end and returns what it printed; ``rc`` is the exit status it must have."""

    def run(*arguments: str, rc: int = 0, cwd: Path = home) -> str:
        done = subprocess.run(
            [truss_command, *arguments],
            env=variables(home),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == rc, f"{arguments} exited with {done.returncode}:\n{said}\n{at_8000.log}"
        return done.stdout

    return run


class Terminal:
    """A command in a terminal of its own, for the questions that truss asks."""

    def __init__(self, command: list[str], home: Path) -> None:
        self.seen = ""
        self._mark = 0
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            command,
            env=variables(home) | {"TERM": "xterm"},
            cwd=home,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def _read(self, deadline: float) -> bool:
        """Take in what was printed; False at the end."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more came:\n{self.seen}"
        try:
            chunk = os.read(self._master, 65536)
        except OSError:
            return False
        self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", chunk.decode(errors="replace"))
        return bool(chunk)

    def answer(self, question: str, reply: str) -> None:
        deadline = time.monotonic() + 60
        while question not in self.seen[self._mark :]:
            assert self._read(deadline), f"it ended before {question!r}:\n{self.seen}"
        self._mark = self.seen.index(question, self._mark) + len(question)
        os.write(self._master, (reply + "\r").encode())

    def end(self, rc: int = 0) -> str:
        deadline = time.monotonic() + 60
        while self._read(deadline):
            pass
        os.close(self._master)
        assert self._process.wait(10) == rc, self.seen
        return self.seen

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def terminal(truss_command: Path, at_8000: Gateway, home: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal([str(truss_command), *arguments], home))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def trained(http: httpx.Client) -> Run:
    """A run with a trainer checkpoint and two for samplers."""
    run = Run.create(http).attached()
    run.train(1)
    run.save("resume")
    run.save("one", "save_weights_for_sampler")
    run.train(2)
    run.save("two", "save_weights_for_sampler")
    return run


def checkpoint_ids(run: Run) -> dict[str, str]:
    listed = ok(run.http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"]
    return {row["checkpoint_id"]: row["id"] for row in listed}


def rows(text: str) -> list[list[str]]:
    """The cells of the tables that were printed."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def lines_of_json(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


# -- who am I ---------------------------------------------------------------------------------------------


def test_whoami(truss: Truss):
    workspace, _, user = truss("whoami").strip().partition("\\")
    assert workspace == "default"
    assert user
    assert "enable" in truss("whoami", "--show-aws-assume-role", rc=1)
    assert "default" in truss("whoami", "--show-oidc")


def test_a_wrong_key_is_reported(truss: Truss, home: Path):
    with open(home / ".trussrc", "a") as file:
        file.write("\n[wrong]\nremote_provider = baseten\nremote_url = http://localhost:8000\napi_key = nonsense\n")
    try:
        assert "this API key is not valid here" in truss("loops", "view", "--remote", "wrong", rc=1)
        assert "401" in truss("whoami", "--remote", "wrong", rc=1)
    finally:
        (home / ".trussrc").write_text(TRUSSRC)


# -- runs -------------------------------------------------------------------------------------------------


def test_push(truss: Truss, http: httpx.Client):
    before = {run["id"] for run in ok(http.get("/v1/loops/runs"))["runs"]}
    said = truss("loops", "push", MODEL, "--project-id", "mine", "--replicas", "1", "--sampler-num-replicas", "1")
    assert "provisioned" in said
    (made,) = [run for run in ok(http.get("/v1/loops/runs"))["runs"] if run["id"] not in before]
    assert (made["base_model"], made["sampler"]["base_model"]) == (MODEL, MODEL)
    assert "nobody/none" in truss("loops", "push", "nobody/none", rc=1)
    assert "replicas" in truss("loops", "push", MODEL, "--replicas", "4", rc=1)
    assert "sampler_num_replicas" in truss("loops", "push", MODEL, "--sampler-num-replicas", "3", rc=1)


def test_deactivate(truss: Truss, http: httpx.Client):
    first, second = Run.create(http), Run.create(http)
    assert f"{first.id} deactivated" in truss("loops", "deactivate", "--run-id", first.id, "--yes")
    run = ok(http.get(f"/v1/loops/runs/{first.id}"))["run"]
    assert (run["status"]["name"], run["sampler"]["status"]["name"]) == ("INACTIVE", "INACTIVE")
    deployment = second.resource["deployment_id"]
    assert f"{deployment} deactivated" in truss("loops", "deactivate", deployment, "-y")
    assert ok(http.get(f"/v1/loops/deployments/{deployment}"))["deployment"]["status"]["name"] == "STOPPED"
    assert ok(http.get(f"/v1/loops/runs/{second.id}"))["run"]["status"]["name"] == "INACTIVE"
    assert "'zzzzzzz' not found" in truss("loops", "deactivate", "--run-id", "zzzzzzz", "--yes", rc=1)


def test_view(truss: Truss, http: httpx.Client):
    old, new = Run.create(http), Run.create(http)
    ok(http.post(f"/v1/loops/runs/{old.id}/deactivate", json={}))
    shown = {row[0]: row for row in rows(truss("loops", "view"))}
    assert new.id in shown
    assert old.id not in shown
    assert shown[new.id][1:3] == [MODEL, "ACTIVE"]
    everything = [row[0] for row in rows(truss("loops", "view", "--all", "--reverse"))]
    assert everything.index(new.id) < everything.index(old.id)
    header, *owned = rows(truss("loops", "view", "--org", "-r"))
    assert header[1] == "Owner"
    assert new.id in [row[0] for row in owned]
    listed = lines_of_json(truss("loops", "view", "--output-format", "json", "--all"))
    assert {row["id"]: row["status"] for row in listed}[old.id] == "INACTIVE"


def test_runs_view(truss: Truss, trained: Run, http: httpx.Client):
    other = Run.create(http)
    said = truss("loops", "runs", "view", "--run-id", trained.id)
    assert "DEPRECATED" in said
    _, row = rows(said)
    assert row[:3] == [trained.id, trained.resource["session_id"], MODEL]
    assert row[3].endswith(trained.path)
    listed = [row[0] for row in rows(truss("loops", "runs", "view", "--base-model", MODEL, "--reverse"))]
    assert listed.index(other.id) < listed.index(trained.id)
    assert "No Loops runs found" in truss("loops", "runs", "view", "--base-model", "nobody/none")


def test_usage(truss: Truss, trained: Run, http: httpx.Client):
    alone = ok(
        http.post("/v1/loops/samplers", json={"session_id": trained.resource["session_id"], "base_model": MODEL})
    )
    said = truss("loops", "usage", "--all")
    assert "Trainer GPUs:" in said
    shown = {row[0]: row for row in rows(said)}
    assert shown[trained.id][2:5:2] == [MODEL, "ACTIVE"]
    mine = truss("loops", "usage", "--mine", "-o", "json")
    (deployment,) = [row for row in lines_of_json(mine) if row["latest_run_id"] == trained.id]
    assert (deployment["status"], deployment["active_run_id"]) == ("ACTIVE", trained.id)
    kind = deployment["trainer_instance_type"]
    assert isinstance(kind, dict)
    assert kind["memory_limit_mib"] > 0
    assert alone["sampler"]["id"] in [row["id"] for row in lines_of_json(mine)]
    owner = deployment["owner"] or "nobody@example.org"
    named = lines_of_json(truss("loops", "usage", "--user", str(owner), "--output-format", "json"))
    assert all(row["owner"] == owner for row in named)
    assert (trained.id in [row["latest_run_id"] for row in named]) == (deployment["owner"] is not None)


def test_samplers_view(truss: Truss, trained: Run):
    said = truss("loops", "samplers", "view", "--reverse")
    assert "DEPRECATED" in said
    sampler = trained.resource["sampler"]
    (row,) = [row for row in rows(said) if row[0] == sampler["id"]]
    assert row[1:3] == [sampler["deployment_id"], MODEL]
    assert row[3].endswith(f"/loops/samplers/{sampler['id']}")


# -- checkpoints --------------------------------------------------------------------------------------------


def test_checkpoints_view(truss: Truss, trained: Run):
    view = ("loops", "checkpoints", "view", "--run-id", trained.id)
    ids = checkpoint_ids(trained)
    shown = {row[2]: row for row in rows(truss(*view))[1:]}
    assert {name: (row[0], row[1], row[3]) for name, row in shown.items()} == {
        "resume": (trained.id, ids["resume"], "trainer"),
        "one": (trained.id, ids["one"], "sampler"),
        "two": (trained.id, ids["two"], "sampler"),
    }
    by_size = csv.DictReader(io.StringIO(truss(*view, "--sort", "size", "--order", "desc", "-o", "csv")))
    sizes = [int(row["Size (bytes)"]) for row in by_size]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] > 0
    named = json.loads(truss(*view, "--sort", "checkpoint-id", "--output-format", "json"))
    assert [row["checkpoint_id"] for row in named["checkpoints"]] == ["one", "resume", "two"]
    assert named["checkpoints"][0]["lora_adapter_config"]["r"] == trained.resource["lora_rank"]
    empty = Run.create(trained.http)
    latest = json.loads(truss("loops", "checkpoints", "view", "--base-model", MODEL, "-o", "json"))
    assert (latest["run_id"], latest["total_checkpoints"]) == (empty.id, 0)


DEPLOY_CONFIG = """
from truss_train import definitions
deploy = definitions.DeployCheckpointsConfig(
    model_name="{name}",
    checkpoint_details=definitions.CheckpointList(loops_checkpoint_ids={ids!r}),
    runtime=definitions.DeployCheckpointsRuntime(
        environment_variables={{{variable!r}: definitions.SecretReference(name="hf_access_token")}}
    ),
    compute=definitions.Compute(cpu_count=1, memory="64Mi"),
)
"""


def deployed(http: httpx.Client, said: str) -> dict[str, object]:
    """The sampler behind the ids that a deployment printed."""
    model, deployment = re.search(r"Model ID:\s+(\w+)\s+Deployment ID:\s+(\w+)", said).groups()  # type: ignore[union-attr]
    ready = ok(http.get(f"/v1/models/{model}/deployments/{deployment}"))
    assert ready["status"] == "ACTIVE", ready
    samplers = ok(http.get("/v1/loops/samplers"))["samplers"]
    return next(row for row in samplers if row["model_id"] == model)


def test_checkpoints_deploy(truss: Truss, terminal: Callable[..., Terminal], trained: Run, home: Path):
    ids = checkpoint_ids(trained)
    deploy = ("loops", "checkpoints", "deploy")
    config = home / "deploy.py"
    config.write_text(DEPLOY_CONFIG.format(name="from-file", ids=[ids["two"]], variable="HF_TOKEN"))
    before = len(ok(trained.http.get("/v1/loops/samplers"))["samplers"])
    dry = truss(*deploy, "--config", str(config), "--dry-run")
    assert "did not deploy" in dry
    assert f"bt://loops:{trained.id}/sampler_weights/two" in dry
    assert len(ok(trained.http.get("/v1/loops/samplers"))["samplers"]) == before

    sampler = deployed(trained.http, truss(*deploy, "--config", str(config)))
    asked = {"model": "two", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    answer = ok(trained.http.post(f"{sampler['base_url']}/v1/chat/completions", json=asked))
    assert answer["choices"][0]["message"]["role"] == "assistant"

    by_name = terminal(*deploy, "--run-id", trained.id, "--checkpoints", "one,two", "--remote", "local")
    by_name.answer("Enter the model name", "by-name")
    by_name.answer("secret name", "")
    assert deployed(trained.http, by_name.end())["base_model"] == MODEL
    by_id = terminal(*deploy, "--checkpoint-ids", ids["one"])
    by_id.answer("Enter the model name", "by-id")
    by_id.answer("secret name", "")
    assert deployed(trained.http, by_id.end())["base_model"] == MODEL


def test_checkpoints_deploy_refuses_by_name(truss: Truss, trained: Run, home: Path):
    ids = checkpoint_ids(trained)
    config = home / "wrong.py"
    config.write_text(DEPLOY_CONFIG.format(name="x", ids=[ids["two"]], variable="MY_SETTING"))
    assert "MY_SETTING" in truss("loops", "checkpoints", "deploy", "--config", str(config), rc=1)
    config.write_text(DEPLOY_CONFIG.format(name="x", ids=["zzzzzzz"], variable="HF_TOKEN"))
    assert "'zzzzzzz' not found" in truss("loops", "checkpoints", "deploy", "--config", str(config), "--dry-run", rc=1)


# -- logs and exec ------------------------------------------------------------------------------------------


def test_logs(truss: Truss, http: httpx.Client):
    run = Run.create(http).attached()
    run.train(1)
    sampler, deployment = run.resource["sampler"], run.resource["deployment_id"]
    assert "RUNNING" in truss("loops", "logs", "--run-id", run.id)
    assert "ACTIVE" in truss("loops", "logs", "--run-id", run.id, "--sampler")
    assert "DEPRECATED" in truss("loops", "logs", "--loops-deployment-id", deployment)
    assert "DEPRECATED" in truss("loops", "logs", "--sampler-deployment-id", sampler["deployment_id"])
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate", json={}))
    # Following ends by itself, as what is followed has ended.
    assert "RUNNING" in truss("loops", "logs", "--run-id", run.id, "--tail")
    assert "ACTIVE" in truss("loops", "logs", "--run-id", run.id, "--sampler", "--tail")


EXEC_OPTIONS = (
    *("--accelerator", "H100", "--gpu-count", "1", "--cpu-count", "2", "--memory", "1Gi", "--image", "python:3.12"),
    *("--workspace-root", "..", "--exclude-dir", "x", "--external-dir", "/tmp", "--env", "A=b", "--no-ssh"),
    *("--with-uv", "--no-tail", "--no-api-key", "--project-name", "p"),
)


def test_exec(truss: Truss, home: Path):
    """Containers are the hosted service's: the refusal says why, and what to do instead."""
    work = home / "work"
    work.mkdir()
    for options in ((), EXEC_OPTIONS, ("--team", "default"), ("--secret", "A=b", "--api-key", "--ssh", "--tail")):
        said = truss("loops", "exec", *options, "--", "python", "my.py", rc=1, cwd=work)
        assert "there is neither here. Run the command where you are" in said.replace("\n", " ")
        assert "422" in said
    for option in ("--output-format", "-o"):
        error = json.loads(truss("loops", "exec", option, "json", "--", "python", "my.py", rc=1, cwd=work))["error"]
        assert error["status_code"] == 422
        assert error["response_body"]["details"]["field"] == "training_project"


def test_every_command_and_option_is_tested(truss_command: Path):
    python = truss_command.with_name("python")
    said = subprocess.run([python, "-c", COMMANDS], capture_output=True, text=True, check=True).stdout
    source = Path(__file__).read_text()
    for name, options in json.loads(said):
        assert f"test_{'_'.join(name)}" in globals(), f"truss loops {' '.join(name)} has no test"
        missing = [option for option in set(options) - OF_EVERY_COMMAND if f'"{option}"' not in source]
        assert not missing, (name, missing)

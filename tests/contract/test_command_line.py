"""Our own command line against a real gateway: what people read, what programs read, and how it fails."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from test_tinker import Wire
from typer.testing import CliRunner

import stores
from gateway import KEY, MODEL, Gateway, Run, datum, environment, new_session, ok, words
from selfloop.cli.main import app

WIDTH = 100


@pytest.fixture(scope="module")
def trained(http: httpx.Client) -> Run:
    run = Run.create(http, name="mine").attached()
    run.train(1)
    run.save("resume")
    run.save("one", "save_weights_for_sampler")
    run.train(2)
    run.save("two", "save_weights_for_sampler")
    return run


class Cli:
    """Runs commands in this process, where starting one costs nothing; in a terminal in one of their own."""

    def __init__(self, gateway: Gateway) -> None:
        self._env = {"SELFLOOP_URL": gateway.url, "SELFLOOP_API_KEY": KEY, "COLUMNS": str(WIDTH), "NO_COLOR": "1"}
        self._env |= stores.environment(gateway.data_dir)

    def run(self, *arguments: str, rc: int = 0, stdin: str = "", **env: str) -> Result:
        done = CliRunner().invoke(app, arguments, input=stdin, env=self._env | env)
        assert done.exit_code == rc, f"{arguments} exited with {done.exit_code}:\n{done.output}"
        return done

    def text(self, *arguments: str, **more: Any) -> str:
        return self.run(*arguments, **more).stdout

    def json(self, *arguments: str, **env: str) -> Any:
        return json.loads(self.text(*arguments, "--json", **env))

    def error(self, *arguments: str, **env: str) -> str:
        """The one line on standard error of a command that must fail."""
        done = self.run(*arguments, rc=1, **env)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        return line

    def in_terminal(self, *arguments: str) -> list[str]:
        """The lines that a person sees in a terminal of ``WIDTH`` columns."""
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "selfloop.cli.main", *arguments]
        process = subprocess.Popen(command, env=environment(**self._env), stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        seen = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:
                break
            if not chunk:
                break
            seen += chunk
        os.close(master)
        assert process.wait(30) == 0, seen.decode()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode()).splitlines()


@pytest.fixture(scope="module")
def cli(gateway: Gateway) -> Cli:
    return Cli(gateway)


def test_runs(cli: Cli, trained: Run, gateway: Gateway):
    (line,) = [line for line in cli.text("runs").splitlines() if trained.id in line]
    assert line.split()[:5] == [trained.id, "mine", MODEL, "RUNNING", "ACTIVE"]
    listed = {row["id"]: row for row in cli.json("runs")}
    assert listed[trained.id]["lora_rank"] == 8
    assert trained.id in {row["id"] for row in cli.json("runs", "--team")}
    offline = cli.text("runs", "--data-dir", str(gateway.data_dir), SELFLOOP_URL="")
    (line,) = [line for line in offline.splitlines() if trained.id in line]
    assert line.split()[:6] == [trained.id, "mine", MODEL, "ACTIVE", "2", "8"]


def test_listing_by_its_own_name(cli: Cli, trained: Run):
    """Other groups have it, so a hand types it."""
    for group in (("runs",), ("samplers",), ("checkpoints", "--run", trained.id)):
        assert cli.json(*group) == cli.json(group[0], "list", *group[1:]) != []


def test_usage_of_a_server(cli: Cli, trained: Run, gateway: Gateway):
    """The same of the server as of its data directory; a window and the team are asked of the server, too."""
    line_of_run = {row["run_id"]: row for row in cli.json("usage")}[trained.id]
    stored = cli.json("usage", "--data-dir", str(gateway.data_dir), SELFLOOP_URL="")
    assert line_of_run == next(row for row in stored if row["run_id"] == trained.id)
    assert line_of_run["operations"] > 2
    assert trained.id in {row["run_id"] for row in cli.json("usage", "--since", "1h", "--team")}
    assert cli.json("usage", "--by", "team")[0]["name"] == "default"
    (line,) = [line for line in cli.text("usage").splitlines() if trained.id in line]
    assert line.split()[:3] == [trained.id, "mine", str(line_of_run["operations"])]


def test_runs_show_and_deactivate(cli: Cli, trained: Run, http: httpx.Client):
    shown = cli.json("runs", "show", trained.id)
    assert (shown["steps"], shown["deployment"]["status"]["name"]) == (2, "RUNNING")
    lines = [line.split() for line in cli.text("runs", "show", trained.id).splitlines()]
    assert ["sampler.id", trained.resource["sampler"]["id"]] in lines
    other = Run.create(http)
    assert other.id in cli.text("runs", "deactivate", other.id)
    assert ok(http.get(f"/v1/loops/runs/{other.id}"))["run"]["status"]["name"] == "INACTIVE"
    assert "'zzzzzzz' not found" in cli.error("runs", "deactivate", "zzzzzzz")


def test_samplers(cli: Cli, trained: Run, http: httpx.Client):
    sampler = trained.resource["sampler"]["id"]
    lines = [line.split() for line in cli.text("samplers").splitlines()]
    (line,) = [line for line in lines if line[:1] == [sampler]]
    assert line[1:4] == [trained.id, MODEL, "ACTIVE"]
    assert MODEL in cli.json("samplers", "show", sampler)["models"]
    assert cli.text("samplers", "wake", sampler) == f"{sampler}: ACTIVE\n"
    body = {"session_id": trained.resource["session_id"], "base_model": MODEL}
    alone = ok(http.post("/v1/loops/samplers", json=body))["sampler"]["id"]
    cli.run("samplers", "deactivate", alone)
    assert cli.json("samplers", "show", alone)["status"]["name"] == "INACTIVE"
    assert "INACTIVE" in cli.error("samplers", "wake", alone)


def test_checkpoints(cli: Cli, trained: Run):
    rows = cli.json("checkpoints", "--run", trained.id)
    assert [row["checkpoint_id"] for row in rows] == ["two", "one", "resume"]
    (line,) = [line for line in cli.text("checkpoints").splitlines() if rows[0]["id"] in line]
    assert line.split()[:3] == [rows[0]["id"], f"bt://loops:{trained.id}/sampler_weights/two", "2"]
    trainers = cli.json("checkpoints", "--run", trained.id, "--target", "trainer")
    assert [row["checkpoint_id"] for row in trainers] == ["resume"]
    assert cli.json("checkpoints", "--model", "nobody/none") == []
    assert "--target" in cli.run("checkpoints", "--target", "x", rc=2).stderr


def test_checkpoints_download_goes_on_where_it_stopped(cli: Cli, trained: Run, tmp_path: Path):
    path = f"bt://loops:{trained.id}/sampler_weights/one"
    whole = trained.files(path)
    name, content = max(whole.items(), key=lambda item: len(item[1]))
    begun = tmp_path / f"{name}.part"
    begun.parent.mkdir(parents=True, exist_ok=True)
    # Other bytes than the server's show that the first half is not asked for again.
    half = len(content) // 2
    begun.write_bytes(b"x" * half)
    (tmp_path / f"{min(whole)}.part").write_bytes(whole[min(whole)] + b"too much")
    cli.run("checkpoints", "download", path, str(tmp_path))
    assert (tmp_path / name).read_bytes() == b"x" * half + content[half:]
    (tmp_path / name).unlink()
    cli.run("checkpoints", "download", path, str(tmp_path))
    assert {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == whole
    assert "'zzzzzzz' not found" in cli.error("checkpoints", "download", "zzzzzzz", str(tmp_path))


def test_checkpoints_delete(cli: Cli, http: httpx.Client):
    run = Run.create(http).attached()
    for name in ("step-1", "step-2", "other"):
        run.save(name, "save_state")

    def names() -> list[str]:
        return sorted(row["checkpoint_id"] for row in cli.json("checkpoints", "--run", run.id))

    delete = ("checkpoints", "delete", "--run", run.id)
    assert "would delete" in cli.text(*delete, "--name", "step-*", "--dry-run")
    assert names() == ["other", "step-1", "step-2"]
    said = cli.json(*delete, "--name", "step-*", "--keep-last", "2", "--yes")
    assert [row["checkpoint_id"] for row in said["deleted"]] == ["step-1"]
    assert names() == ["other", "step-2"]
    assert "--yes" in cli.error(*delete)
    cli.run(*delete, "--target", "trainer", "--older-than", "0s", "--yes")
    assert names() == []


def test_a_filter_before_the_command_is_not_lost(cli: Cli, trained: Run):
    said = cli.run("checkpoints", "--run", trained.id, "delete", "--name", "*", "--yes", rc=2).stderr
    assert "goes after `delete`" in said


def said(output: str) -> tuple[str, str]:
    """What `chat` printed: which weights answer, and their answer."""
    first, _, rest = output.partition("\n")
    return first.removeprefix("[weights: ").removesuffix("]"), rest


ASK = ("--prompt", "Hi", "--max-tokens", "5", "--temperature", "0")


def test_deploy_and_chat(cli: Cli, trained: Run, http: httpx.Client):
    one, two = (f"bt://loops:{trained.id}/sampler_weights/{name}" for name in ("one", "two"))
    made = cli.json("checkpoints", "deploy", one, two, "--name", "served")
    sampler = made["sampler"]["id"]
    assert {one, two} <= set(cli.json("samplers", "show", sampler)["models"])
    answer = cli.json("chat", sampler, *ASK, "--model", "two")
    assert 1 <= answer["usage"]["completion_tokens"] <= 5
    assert cli.text("chat", sampler, *ASK, "--model", "two").endswith(f"]\n{answer['text']}\n")
    # The run's own sampler serves the same weights live, and so does one made for the checkpoint.
    assert cli.json("chat", trained.id, *ASK)["text"] == answer["text"]
    assert cli.json("chat", trained.resource["sampler"]["id"], *ASK)["weights"] == f"checkpoint {two}"
    before = {row["id"] for row in ok(http.get("/v1/loops/samplers"))["samplers"]}
    assert cli.json("chat", two, *ASK)["text"] == answer["text"]
    (own,) = [row for row in ok(http.get("/v1/loops/samplers"))["samplers"] if row["id"] not in before]
    assert own["status"]["name"] == "INACTIVE"
    _, lines = said(cli.text("chat", sampler, *ASK[2:], "--model", "two", stdin="Hi\nHi\n\n"))
    assert lines.startswith(answer["text"] + "\n")
    _, piped = said(cli.text("chat", sampler, *("--prompt", "-", *ASK[2:]), "--model", "two", stdin="Hi"))
    assert piped == answer["text"] + "\n"
    cli.run("samplers", "deactivate", sampler)
    assert "INACTIVE" in cli.error("chat", sampler, *ASK)
    assert "no run, sampler or checkpoint" in cli.error("chat", "zzzzzzz", *ASK)
    assert "--prompt" in cli.run("chat", sampler, "--json", rc=2).stderr


def test_what_equals_the_base_model_is_reported_when_it_is_deployed(cli: Cli, http: httpx.Client):
    """Also in the sampler's own log, as it is of a sampler that is made for the checkpoint."""
    run = Run.create(http).attached()
    fresh = run.save("fresh", "save_weights_for_sampler")
    run.train(1)
    trained = run.save("trained", "save_weights_for_sampler")
    said = cli.run("checkpoints", "deploy", fresh, trained, "--name", "untrained").stderr
    assert said == f"warning: checkpoint {fresh} equals the base model: its adapter changes nothing\n"
    assert cli.run("checkpoints", "deploy", trained, "--name", "trained").stderr == ""
    for path, is_reported in ((fresh, True), (trained, False)):
        body = {"session_id": new_session(http), "model_path": path}
        made = ok(http.post("/v1/loops/samplers", json=body))["sampler"]
        assert ("equals the base model" in cli.text("logs", made["id"])) == is_reported


def far_trained(http: httpx.Client, name: str) -> Run:
    """A run whose answers differ from the base model's."""
    run = Run.create(http, name=name).attached()
    for seed in (1, 2, 3):
        run.forward_backward([datum(words(seed))])
        run.step(learning_rate=0.5)
    return run


def test_chat_of_a_run_is_of_its_newest_weights(cli: Cli, http: httpx.Client):
    """Nothing was published, so the run's sampler serves the base model still; what the run's client does goes on."""
    run = far_trained(http, "chatty")
    sampler = run.resource["sampler"]["id"]
    weights, base = said(cli.text("chat", sampler, *ASK))
    assert weights.startswith(f"the base model {MODEL}: run {run.id} has published none")
    checkpoints = ok(http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"]
    weights, newest = said(cli.text("chat", run.id, *ASK))
    assert weights == f"run {run.id} at step 3, as they are now"
    assert newest != base
    assert ok(http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"] == checkpoints
    # The sequence of the run's own client has no hole and no stranger in it, and nothing was published.
    run.save("published", "save_weights_for_sampler")
    assert said(cli.text("chat", sampler, *ASK)) == (
        f"checkpoint {'bt://loops:' + run.id + '/sampler_weights/published'}",
        newest,
    )
    run.step(learning_rate=0.0)
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate", json={}))
    weights, last = said(cli.text("chat", run.id, *ASK))
    assert f"sampler_weights/published, the newest of run {run.id}, which has ended (step 3)" in weights
    assert last == newest


def test_a_sampler_of_the_newest_weights(http: httpx.Client, other_team: httpx.Client):
    """What `chat` asks for: it is nobody's published weights, and only the run's team may have it."""
    run = far_trained(http, "newest")
    made = ok(http.post(f"/v1/loops/runs/{run.id}/newest_sampler"))
    assert made["weights"] == {"run_id": run.id, "step": 3, "path": None}
    sampler = Run(http, made["sampler"])
    scored = {"prompt": words(99), "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0.0}
    answer = ok(http.post(f"/loops/samplers/{sampler.id}/v1/completions", json={"model": MODEL} | scored))
    scored = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(words(99))]
    assert scored == pytest.approx(run.logprobs(words(99)), abs=1e-3)
    assert other_team.post(f"/v1/loops/runs/{run.id}/newest_sampler").status_code == 404
    ok(http.post(f"/v1/loops/samplers/{sampler.id}/deactivate", json={}))


def test_chat_of_a_run_that_says_nothing_of_itself(cli: Cli, http: httpx.Client):
    fresh = Run.create(http).attached()
    assert "at step 0, untrained: it answers as the base model" in cli.json("chat", fresh.id, *ASK)["weights"]
    ok(http.post(f"/v1/loops/runs/{fresh.id}/deactivate", json={}))
    assert f"run {fresh.id} is INACTIVE and has no checkpoint to sample from" in cli.error("chat", fresh.id, *ASK)


def test_chat_of_what_the_tinker_client_trained(cli: Cli, gateway: Gateway):
    """Its runs have no sampler of their own: the newest weights answer, by every name that the client prints."""
    wire = Wire(gateway)
    model = wire.model(wire.session())
    base = cli.json("chat", model, *ASK)["text"]
    for seq in (1, 3, 5):
        wire.loss(model, seq, seq)
        wire.result(wire.step(model, seq + 1, learning_rate=0.5))
    path = wire.result(wire.post("/api/v1/save_weights_for_sampler", model_id=model, path="kept", seq_id=7))["path"]
    weights, newest = said(cli.text("chat", model, *ASK))
    assert "at step 3, as they are now" in weights
    assert newest.strip() != base.strip()
    assert path.startswith("tinker://")
    assert said(cli.text("chat", path, *ASK)) == (f"checkpoint {path} (step 3)", newest)
    # The client's own order goes on as if nobody had asked.
    wire.result(wire.step(model, 8))


def test_every_name_that_a_client_prints(cli: Cli, gateway: Gateway, tmp_path: Path):
    wire = Wire(gateway)
    model = wire.model(wire.session())
    path = wire.result(wire.post("/api/v1/save_weights", model_id=model, path="state", seq_id=1))["path"]
    ours = cli.json("runs", "show", model)["id"]
    assert (ours != model, path) == (True, f"tinker://{model}/weights/state")
    (saved,) = cli.json("checkpoints", "--run", model)
    bt = saved["path"]
    for name in (ours, path, bt, f"bt://loops:{ours}"):
        assert cli.json("runs", "show", name)["id"] == ours
        assert cli.text("logs", name) == cli.text("logs", ours)
        assert cli.json("checkpoints", "--run", name) == [saved]
    env = {"SELFLOOP_URL": ""}
    for i, name in enumerate((saved["id"], path, bt)):
        cli.run("checkpoints", "download", name, str(tmp_path / f"down{i}"))
        export = ("export", name, str(tmp_path / f"out{i}"), "--to", "peft", "--data-dir", str(gateway.data_dir))
        cli.run(*export, **env)
        assert cli.json("chat", name, *ASK)["weights"].startswith(f"checkpoint {name}")
    asked = {"session_id": wire.session(), "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = wire.post("/api/v1/create_sampling_session", **asked)["sampling_session_id"]
    shown = cli.json("samplers", "show", sampler)
    assert shown["id"] != sampler
    for name in (shown["id"], shown["model_id"], shown["deployment_id"]):
        assert cli.json("samplers", "show", name)["id"] == shown["id"]
    assert cli.json("chat", sampler, *ASK)["weights"] == f"the base model {MODEL}"
    assert "of the form tinker://" in cli.error("chat", "tinker://nonsense", *ASK)
    assert "not found" in cli.error("checkpoints", "download", f"tinker://{model}/weights/other", str(tmp_path))


def test_logs(cli: Cli, http: httpx.Client):
    run = Run.create(http).attached()
    run.train(1)
    sampler, deployment = run.resource["sampler"]["id"], run.resource["deployment_id"]
    assert "RUNNING" in cli.text("logs", run.id)
    assert "ACTIVE" in cli.text("logs", sampler)
    assert cli.text("logs", deployment, "--limit", "1").count("\n") == 1
    lines = [json.loads(line) for line in cli.text("logs", deployment, "--json").splitlines()]
    times = [int(line["timestamp"]) for line in lines]
    assert times == sorted(times)
    assert abs(times[-1] / 1e9 - time.time()) < 3600
    assert cli.text("logs", deployment, "--level", "error") == ""
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate", json={}))
    # What is followed has ended, so this does, too.
    assert "STOPPED" in cli.text("logs", run.id, "--follow")
    assert "no run, sampler or deployment 'zzzzzzz'" in cli.error("logs", "zzzzzzz")


@pytest.mark.parametrize("command", [("runs",), ("samplers",), ("checkpoints",)])
def test_tables_fit_a_terminal(cli: Cli, trained: Run, command: tuple[str, ...]):
    if command == ("checkpoints",):  # of other tests' runs, some have longer ids
        command = (*command, "--run", trained.id)
    lines = [line for line in cli.in_terminal(*command) if line.strip()]
    assert max(len(line.rstrip()) for line in lines) <= WIDTH
    assert len(lines) - 2 == len(cli.json(*command)), "a heading, a rule, and one line each"


def test_failures_are_one_line(cli: Cli, tmp_path: Path):
    assert "no server answers at http://127.0.0.1:1" in cli.error("samplers", "--url", "http://127.0.0.1:1")
    assert "not valid here" in cli.error("samplers", SELFLOOP_API_KEY="wrong")
    assert "SELFLOOP_API_KEY" in cli.error("samplers", "--data-dir", str(tmp_path), SELFLOOP_API_KEY="")
    assert "nonsense" in cli.error("samplers", "--url", "nonsense")


def test_the_key_of_the_data_directory_is_used(cli: Cli, tmp_path: Path, trained: Run):
    (tmp_path / "api_key").write_text(KEY + "\n")
    assert trained.id in cli.text("runs", "--data-dir", str(tmp_path), SELFLOOP_API_KEY="")

"""`selfloop serve` as the tree of settings makes it, with an option that is added from outside the tree."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from selfloop.cli import local, serve
from selfloop.cli.main import app
from selfloop.cli.options import command_of
from selfloop.server import serve as server
from selfloop.types.option_sources import load, to_toml
from selfloop.types.options import group, leaves, option
from selfloop.types.settings import ControlSettings, EngineSettings, Settings, WorkerSettings

DOCS = Path(__file__).parents[3] / "docs"


@dataclass(frozen=True, slots=True)
class MoreEngineSettings(EngineSettings):
    warm_up_s: float = option(2.0, "How long to warm up for.", minimum=0.5)


@dataclass(frozen=True, slots=True)
class MoreWorkerSettings(WorkerSettings):
    engine: MoreEngineSettings = group(MoreEngineSettings, "engine", "Engine")


@dataclass(frozen=True, slots=True)
class MoreControlSettings(ControlSettings):
    worker: MoreWorkerSettings = group(MoreWorkerSettings, "worker", "Workers")


@dataclass(frozen=True, slots=True)
class MoreSettings(Settings):
    control: MoreControlSettings = group(MoreControlSettings, "control", "Data, sessions and recovery")


def test_an_option_is_one_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Added to a group of the tree it is on the command line, in the environment, in a file and on the page."""
    seen: list[float] = []

    def run(given: Mapping[str, str], file: Path | None, print_only: bool) -> None:
        loaded = load(MoreSettings, given, os.environ, file)
        seen.append(loaded.settings.control.worker.engine.warm_up_s)
        if print_only:
            print(to_toml(loaded), end="")

    more = typer.Typer()
    more.command()(command_of(MoreSettings, run, "Run it."))
    file = tmp_path / "selfloop.toml"
    file.write_text("[engine]\nwarm_up = 3\n")

    def invoke(*arguments: str, **environment: str) -> str:
        done = CliRunner().invoke(more, arguments, env=environment, catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert "How long to warm up for. Default: 2." in " ".join(re.sub(r"[│\n]", " ", invoke("--help")).split())
    invoke()
    invoke("--config", str(file))
    invoke("--config", str(file), SELFLOOP_WARM_UP="4")
    printed = invoke("--config", str(file), "--warm-up", "5", "--print-config", SELFLOOP_WARM_UP="4")
    assert seen == [2.0, 3.0, 4.0, 5.0]
    assert "\nwarm_up = 5  # --warm-up\n" in printed

    monkeypatch.syspath_prepend(DOCS)
    import generate

    row = "| `--warm-up` | `SELFLOOP_WARM_UP` | How long to warm up for. | `2` | "
    assert row + "a time such as 90, 90s or 15m of at least 0.5s |" in generate.options(MoreSettings)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that `serve` was started with, which then ends at once."""
    started: list[Settings] = []
    monkeypatch.setattr(server, "serve", lambda settings, on_listening: started.append(settings))
    return started


def invoke(*arguments: str, rc: int = 0, **environment: str) -> Any:
    done = CliRunner().invoke(app, ["serve", *arguments], env=environment)
    assert done.exit_code == rc, done.output
    return done


@pytest.mark.parametrize("leaf", leaves(Settings), ids=lambda leaf: leaf.name)
def test_the_command_has_every_option_but_those_that_must_not_be_seen(leaf: Any):
    (command,) = [each for each in app.registered_commands if each.name == "serve"]
    assert command.callback is serve.serve_command
    done = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"})
    assert (leaf.flag in done.output.split()) == leaf.option.flag


def test_help_fits_a_narrow_terminal():
    """No name of an option is cut short."""
    lines = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "80"}).output
    for leaf in leaves(Settings):
        assert not leaf.option.flag or f"│ {leaf.flag} " in lines, leaf.name
    assert "…" not in lines


def test_what_was_given_is_what_the_server_gets(served: list[Settings], tmp_path: Path):
    file = tmp_path / "selfloop.toml"
    file.write_text('api_key = "from-the-file"\nhub_url = "off"\nmetrics_public = true\n')
    file.chmod(0o600)
    invoke("--config", str(file), "--data-dir", str(tmp_path / "data"), "--no-metrics-public", "--memory", "2.6GiB")
    (settings,) = served
    assert settings.api_key == "from-the-file"
    assert settings.hub_url is None
    assert not settings.metrics_public
    assert settings.data_dir == tmp_path / "data"
    assert settings.control.worker.engine.limits.memory_bytes == round(2.6 * 2**30)
    assert settings.control.prepare


def test_a_former_name_is_still_taken(served: list[Settings], tmp_path: Path):
    invoke("--kept-memory", "3GiB", "--data-dir", str(tmp_path))
    invoke("--kept-memory", "3GiB", "--forward-cache", "2GiB", "--data-dir", str(tmp_path))
    assert [each.control.worker.engine.limits.forward_cache_bytes for each in served] == [3 * 2**30, 2 * 2**30]


def test_a_file_with_secrets_that_others_can_read_is_warned_of(served: list[Settings], tmp_path: Path):
    file = tmp_path / "selfloop.toml"
    file.write_text('api_key = "hunter2"\n')
    file.chmod(0o640)
    said = invoke("--config", str(file)).stderr
    assert said == f"{file} holds api_key and is open to other users: chmod 600 closes it\n"
    file.chmod(0o600)
    assert invoke(SELFLOOP_CONFIG=str(file)).stderr == ""
    assert [settings.api_key for settings in served] == ["hunter2", "hunter2"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "0"], "--port: a whole number from 1 to 65535, got 0"),
        (["--port", "x"], "--port: a whole number from 1 to 65535, got x"),
        (["--training-share", "1"], "--training-share: a number from 0.01 to 0.99, got 1"),
        (["--device", "tpu"], "--device: one of auto, cpu, cuda, got tpu"),
        (["--memory", "0"], "--memory: a size such as 2.6GiB or 900MiB of at least 0.001GiB, got 0"),
        (["--hub-url", "nowhere"], "--hub-url: an address like https://huggingface.co, or off; got 'nowhere'"),
        (["--tls-cert", "x"], "--tls-cert and --tls-key: both, or neither"),
        (["--config", "/nowhere"], "/nowhere: a file that can be read (No such file or directory)"),
    ],
)
def test_a_wrong_value_ends_the_start_in_a_line(served: list[Settings], arguments: list[str], says: str):
    assert invoke(*arguments, rc=2).stderr == f"{says}\n"
    assert served == []


def test_printed_settings_hide_secrets_and_start_nothing(served: list[Settings], tmp_path: Path):
    printed = invoke("--print-config", "--port", "9", SELFLOOP_API_KEY="hunter2", SELFLOOP_HUB_URL="off").stdout
    assert "port = 9  # --port\n" in printed
    assert 'hub_url = "off"  # $SELFLOOP_HUB_URL\n' in printed
    assert '# api_key = "***"  # $SELFLOOP_API_KEY\n' in printed
    assert "hunter2" not in printed
    assert served == []
    file = tmp_path / "selfloop.toml"
    file.write_text(printed)
    assert load(Settings, {}, {}, file).settings.port == 9


def test_other_commands_take_their_options_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "selfloop.toml"
    file.write_text(f'data_dir = "{tmp_path}/here"\nport = 7\n[control]\nstore = "s3://bucket/of-the-file"\n')
    for name in ("SELFLOOP_DATABASE_URL", "SELFLOOP_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SELFLOOP_CONFIG", str(file))
    monkeypatch.setenv("SELFLOOP_STORE", "s3://bucket/of-the-environment")
    # Another option's variable is not theirs to complain of.
    monkeypatch.setenv("SELFLOOP_HTTP_PORT", "none")
    assert local.resolve(None) == tmp_path / "here"
    assert local.given("store") == "s3://bucket/of-the-environment"
    assert local.given("database_url") is None
    file.write_text("prot = 1")
    done = CliRunner().invoke(app, ["keys", "list"])
    assert (done.exit_code, done.stderr) == (2, f"{file}: prot: no such option; did you mean port?\n")

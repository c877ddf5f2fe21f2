"""What lies in deploy/ says what the server understands: its options, paths, ports and pinned images."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import typer
import yaml

from asgi import app_for_documents
from selfloop.cli.main import app as command_line

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILE = (DEPLOY / "compose/Dockerfile").read_text()
UNIT_FILE = DEPLOY / "systemd/selfloop.service"


def _unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = lambda optionstr: optionstr  # type: ignore[method-assign]
    parser.read(UNIT_FILE)
    return parser["Service"]


def _serve_options() -> set[str]:
    serve = cast(Any, typer.main.get_command(command_line)).commands["serve"]
    return {option for parameter in serve.params for option in parameter.opts}


def _served_paths() -> set[str]:
    app = app_for_documents()
    return set(app.openapi()["paths"])


def _options(arguments: list[str]) -> dict[str, str]:
    """Long options with their values, written with ``=`` or apart."""
    joined = re.sub(r" (?!--)", "=", " ".join(arguments))
    return dict(part.split("=", 1) for part in joined.split() if part.startswith("--"))


@pytest.mark.parametrize(
    "arguments",
    [
        SERVICES["selfloop"]["command"],
        shlex.split(_unit()["ExecStart"])[1:],
        re.findall(r'"([^"]+)"', DOCKERFILE.split("CMD")[-1]),
    ],
    ids=["compose", "systemd", "Dockerfile"],
)
def test_every_option_is_one_of_serve(arguments: list[str]) -> None:
    assert arguments[0] == "serve"
    given = _options(arguments[1:])
    assert given
    assert set(given) <= _serve_options()
    assert given["--data-dir"] == "/var/lib/selfloop"


def test_images_are_pinned_to_a_version() -> None:
    images = [service["image"] for service in SERVICES.values()]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE)
    for image in images:
        name, _, tag = image.partition(":")
        assert name
        assert re.search(r"\d+\.\d+|RELEASE\.\d{4}", tag), image


def test_the_health_check_asks_what_is_served() -> None:
    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\S+?)'", DOCKERFILE)
    assert path in _served_paths()


def test_ports_and_services_meet() -> None:
    server = SERVICES["selfloop"]
    options = _options(server["command"][1:])
    assert server["ports"] == [f"127.0.0.1:{options['--port']}:{options['--port']}"]
    assert f"EXPOSE {options['--port']}" in DOCKERFILE
    assert set(server["depends_on"]) | set(SERVICES["bucket"]["depends_on"]) <= set(SERVICES)
    database = server["environment"]["SELFLOOP_DATABASE_URL"]
    postgres = SERVICES["postgres"]["environment"]
    assert database == f"postgresql://{postgres['POSTGRES_USER']}@postgres/{postgres['POSTGRES_DB']}"
    assert server["environment"]["AWS_ENDPOINT_URL"] == "http://s3:9000"
    assert SERVICES["s3"]["command"].endswith(":9000")
    bucket = options["--store"].removeprefix("s3://").split("/")[0]
    assert SERVICES["bucket"]["command"][0].endswith(f"own/{bucket}")
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]


def test_secrets_come_from_outside_and_are_asked_for() -> None:
    text = (DEPLOY / "compose/compose.yaml").read_text()
    wanted = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    offered = set(re.findall(r"^(\w+)=", (DEPLOY / "compose/.env.example").read_text(), flags=re.MULTILINE))
    assert wanted == offered
    for secret in ("SELFLOOP_API_KEY", "POSTGRES_PASSWORD", "S3_SECRET_KEY"):
        assert f"{secret}=\n" in (DEPLOY / "compose/.env.example").read_text()
        assert f"${{{secret}:?" in text


def test_what_stops_the_server_waits_for_it() -> None:
    grace = float(_options(SERVICES["selfloop"]["command"][1:])["--stop-grace"])
    assert float(SERVICES["selfloop"]["stop_grace_period"].removesuffix("s")) > grace
    unit = _unit()
    assert float(unit["TimeoutStopSec"]) > float(_options(shlex.split(unit["ExecStart"])[2:])["--stop-grace"])


def test_the_unit_is_hardened_and_has_its_state() -> None:
    unit = _unit()
    assert unit["StateDirectory"] == "selfloop"
    for name, value in {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "DynamicUser": "yes"}.items():
        assert unit[name] == value
    assert "EnvironmentFile" in unit


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: on Debian `apt-get install systemd`")
    unit = tmp_path / UNIT_FILE.name
    # What it runs is not installed here.
    unit.write_text(UNIT_FILE.read_text().replace("/opt/selfloop/.venv/bin/selfloop", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

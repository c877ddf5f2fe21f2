"""Commands that talk to a running server: which one, with which key, and how its refusals are shown."""

import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlsplit

import typer

from selfloop.cli import local
from selfloop.cli.serve import KEY_FILE

# The library is loaded by the commands that ask a server, not by `selfloop serve`.
if TYPE_CHECKING:
    import httpx

Json = dict[str, Any]

DEFAULT_URL = "http://127.0.0.1:8000"
# Longer than the server holds a request that waits for capacity.
_TIMEOUT_S, _CONNECT_TIMEOUT_S = 60.0, 5.0
_PAGE_ROWS = 1000
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Url = Annotated[str | None, typer.Option("--url", help=f"The server. Default: $SELFLOOP_URL or {DEFAULT_URL}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


class CommandFailed(Exception):
    """The command cannot continue; the text is the reason."""


class Unreachable(CommandFailed):
    """The server does not answer, or broke off."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server as the holder of one key sees it. Every method raises :class:`CommandFailed` when it refuses."""

    http: "httpx.Client"

    def get(self, path: str, **params: object) -> Json:
        return self._json(self._asked(path, params))

    def rows(self, path: str, name: str, **params: object) -> list[Json]:
        """Every row of a list, read page by page."""
        rows: list[Json] = []
        token: str | None = None
        while True:
            page = self.get(path, page_size=_PAGE_ROWS, page_token=token, **params)
            rows += page[name]
            token = page["next_page_token"]
            if token is None:
                return rows

    def post(self, path: str, body: Json | None = None, timeout_s: float = _TIMEOUT_S) -> Json:
        return self._json(self.http.post(path, json=body or {}, timeout=timeout_s))

    def events(self, path: str, **params: object) -> Iterator[tuple[str, Json]]:
        """Name and data of each server-sent event, as it comes. Raises :class:`Unreachable`, too."""
        import httpx

        name = ""
        try:
            with self.http.stream("GET", path, params=_given(params)) as answer:
                if not answer.is_success:
                    answer.read()
                    raise CommandFailed(refusal(answer))
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        name = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        yield name, json.loads(line.removeprefix("data: "))
        except httpx.TransportError as error:
            raise Unreachable(f"{self.http.base_url}: {error or type(error).__name__}") from None

    def find(self, path: str, **params: object) -> Json | None:
        """The answer of a route, None where it says that there is no such thing."""
        answer = self._asked(path, params)
        return None if answer.status_code == 404 else self._json(answer)

    def _asked(self, path: str, params: Mapping[str, object]) -> "httpx.Response":
        return self.http.get(path, params=_given(params))

    def _json(self, answer: "httpx.Response") -> Json:
        if not answer.is_success:
            raise CommandFailed(refusal(answer))
        return answer.json()


def _given(params: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items() if value is not None}


def segment(text: str) -> str:
    """What a user typed, as one segment of a path."""
    return quote(text, safe=":")


def is_alone(context: typer.Context) -> bool:
    """Whether a group is called by itself, without one of its commands, which would not see the group's options."""
    if context.invoked_subcommand is None:
        return True
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"goes after `{context.invoked_subcommand}`", param_hint=parameter.opts[0])
    return False


def named_url(url: str | None) -> str | None:
    """The server that the user named, by option or environment."""
    return url or os.environ.get("SELFLOOP_URL") or None


@contextmanager
def server(url: str | None, data_dir: Path | None) -> Generator[Server]:
    """A server for the length of a block; a failure is one red line and exit status 1."""
    import httpx

    base = named_url(url) or DEFAULT_URL
    with failing_in_one_line():
        headers = {"Authorization": f"Bearer {api_key(data_dir)}"}
        # A proxy of the environment is for servers elsewhere.
        direct = urlsplit(base).hostname in LOOPBACK
        timeout = httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        try:
            with httpx.Client(base_url=base, headers=headers, timeout=timeout, trust_env=not direct) as http:
                yield Server(http)
        except httpx.ConnectError:
            raise CommandFailed(f"no server answers at {base}: start one with `selfloop serve`, or name it") from None
        except (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError) as error:
            raise CommandFailed(f"{base}: {error or type(error).__name__}") from None


@contextmanager
def failing_in_one_line() -> Generator[None]:
    try:
        yield
    except CommandFailed as failure:
        local.complain(str(failure))
        raise typer.Exit(1) from None


def refusal(answer: "httpx.Response") -> str:
    """Why the server refused, in its own words."""
    try:
        body: object = answer.json()
    except ValueError:
        body = None
    said = body.get("message") if isinstance(body, dict) else None
    if isinstance(body, dict) and said is None and isinstance(body.get("error"), dict):
        said = body["error"].get("message")
    return str(said or f"{answer.request.method} {answer.request.url}: HTTP {answer.status_code}")


def api_key(data_dir: Path | None) -> str:
    """The key of the environment, or else of the data directory. Raises :class:`CommandFailed` if there is none."""
    given = os.environ.get("SELFLOOP_API_KEY")
    if given:
        return given
    file = local.resolve(data_dir) / KEY_FILE
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        raise CommandFailed(f"no API key: set SELFLOOP_API_KEY (there is none in {file} either)") from None


def show(rows: Sequence[Json], columns: Sequence[str], cells: Iterator[Sequence[object]], as_json: bool) -> None:
    """Rows for programs, or their cells as a table for people."""
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    table = local.table(*columns)
    for row in cells:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    local.show(table)


def report(text: str, facts: Json, as_json: bool) -> None:
    """What a command has done: a line for people, or its facts for programs."""
    typer.echo(json.dumps(facts, indent=2) if as_json else text)


def show_one(row: Json, as_json: bool) -> None:
    """One resource: JSON, or a name and a value a line."""
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    flat = list(_flat(row))
    width = max(len(name) for name, _ in flat)
    for name, value in flat:
        typer.echo(f"{name:<{width}}  {value}")


def _flat(row: Json, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(str(item) for item in value)
        elif value is not None and value != "":
            yield prefix + name, value


def moment(stamp: str | None) -> str:
    """A time of the API in local time, short enough for a table."""
    return "" if stamp is None else datetime.fromisoformat(stamp).astimezone().strftime("%b %d %H:%M")

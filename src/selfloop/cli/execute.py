"""``selfloop exec``: a training script with the server's address and key in its environment."""

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from selfloop.cli import client_env, local, remote
from selfloop.types.client_variables import chat_variables, client_variables

# What would keep tokenizers of the server's models from being asked for.
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def execute(
    script: Annotated[Path, typer.Argument(help="A Python script.", exists=True, dir_okay=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own arguments, options too.")] = None,
    python: Annotated[
        Path | None, typer.Option(help="The Python to run it. Default: one that has the official Loops client.")
    ] = None,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
) -> None:
    """Run a training script against a running server, with either official client.

    It becomes the script: signals, output and exit status are the script's own.
    """
    base = (remote.named_url(url) or remote.DEFAULT_URL).rstrip("/")
    with remote.server(url, data_dir) as server:
        # Before the script is started: its client would retry a wrong key or address for minutes.
        server.get("/v1/loops/capabilities")
    with remote.failing_in_one_line():
        interpreter = str(python) if python is not None else _client_python(local.resolve(data_dir))
        command = [interpreter, str(script), *(arguments or [])]
        try:
            os.execvpe(interpreter, command, _environment(base, remote.api_key(data_dir)))
        except OSError as error:
            raise remote.CommandFailed(f"--python: a Python that runs; {interpreter}: {error.strerror}") from None


def _environment(url: str, api_key: str) -> dict[str, str]:
    """The caller's own, pointed at the server."""
    kept = {name: value for name, value in os.environ.items() if name not in _OFFLINE}
    if urlsplit(url).hostname in remote.LOOPBACK:
        # A proxy of the environment is for servers elsewhere.
        direct = ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), *remote.LOOPBACK]))
        kept |= {"NO_PROXY": direct, "no_proxy": direct}
    return kept | chat_variables(url, api_key, kept) | client_variables(url, api_key)


def _client_python(data_dir: Path) -> str:
    python = client_env.find_client_python(data_dir / "demo" / "client-env")
    if python is None:
        raise remote.CommandFailed(
            "no Python here has the official client: name yours with --python, or make one with `make setup`"
        )
    return python

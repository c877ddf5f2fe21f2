"""``selfloop chat``: talk to what a run has learned, in the terminal."""

import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from selfloop.cli import local, remote
from selfloop.cli.samplers import wait_until_ready

_READ_TIMEOUT_S = 600.0


def chat(
    target: Annotated[str, typer.Argument(help="A sampler, a run, or a checkpoint: bt://loops:...")],
    prompt: Annotated[str | None, typer.Option(help="Ask this once and end; `-` reads it from standard input.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    model: Annotated[
        str | None, typer.Option(help="One of the sampler's models. Default: the adapter, if any.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer. Default: the room that is left.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Makes an answer repeatable.")] = None,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --prompt: print the answer with its usage.")] = False,
) -> None:
    """Chat with a sampler, with the sampler of a run, or with a checkpoint."""
    if as_json and prompt is None:
        raise typer.BadParameter("needs --prompt", param_hint="--json")
    with remote.server(url, data_dir) as server, _sampler(server, target) as sampler:
        wait_until_ready(server, sampler)
        asked: remote.Json = {"model": model or _model_of(server, sampler), "temperature": temperature}
        asked |= {name: v for name, v in (("max_tokens", max_tokens), ("seed", seed)) if v is not None}
        talk = _Talk(server, sampler["base_url"], asked, system)
        try:
            if prompt is None:
                _converse(talk, target)
            else:
                _once(talk, sys.stdin.read() if prompt == "-" else prompt, as_json)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


class _Talk:
    """A conversation; every turn is sent whole, as the route remembers nothing."""

    def __init__(self, server: remote.Server, base_url: str, asked: remote.Json, system: str | None) -> None:
        self._server = server
        self._url = f"{base_url}/v1/chat/completions"
        self._asked = asked
        self._messages: list[remote.Json] = [{"role": "system", "content": system}] if system else []
        self.usage: remote.Json = {}
        self.finish_reason: str | None = None

    def say(self, text: str) -> Iterator[str]:
        """The answer in pieces, as they are drawn."""
        self._messages.append({"role": "user", "content": text})
        body = self._asked | {"messages": self._messages, "stream": True, "stream_options": {"include_usage": True}}
        pieces: list[str] = []
        with self._server.http.stream("POST", self._url, json=body, timeout=_READ_TIMEOUT_S) as answer:
            if not answer.is_success:
                answer.read()
                raise remote.CommandFailed(remote.refusal(answer))
            for line in answer.iter_lines():
                event = _event(line)
                if event is None:
                    continue
                if "error" in event:
                    raise remote.CommandFailed(str(event["error"]["message"]))
                self.usage = event.get("usage") or self.usage
                for choice in event["choices"]:
                    self.finish_reason = choice.get("finish_reason") or self.finish_reason
                    piece = choice["delta"].get("content")
                    if piece:
                        pieces.append(piece)
                        yield piece
        self._messages.append({"role": "assistant", "content": "".join(pieces)})


def _event(line: str) -> remote.Json | None:
    """A server-sent event's data; None for lines between events and for the mark of the end."""
    name, _, data = line.partition(":")
    if name != "data" or data.strip() == "[DONE]":
        return None
    return json.loads(data)


def _once(talk: _Talk, prompt: str, as_json: bool) -> None:
    pieces: list[str] = []
    for piece in talk.say(prompt):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    if as_json:
        said = {"text": "".join(pieces), "finish_reason": talk.finish_reason, "usage": talk.usage}
        typer.echo(json.dumps(said, indent=2))
    else:
        typer.echo()


def _converse(talk: _Talk, target: str) -> None:
    if sys.stdin.isatty():
        typer.echo(f"Talking to {target}. An empty line or Ctrl-D ends.", err=True)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not said.strip():
            return
        for piece in talk.say(said):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()


@contextmanager
def _sampler(server: remote.Server, target: str) -> Generator[remote.Json]:
    """The sampler to ask. One made for a checkpoint ends with the chat."""
    if target.startswith("bt://"):
        session = server.post("/v1/loops/sessions")["session"]["id"]
        made = server.post("/v1/loops/samplers", {"session_id": session, "model_path": target})["sampler"]
        try:
            yield made
        finally:
            server.post(f"/v1/loops/samplers/{made['id']}/deactivate")
        return
    run = server.find(f"/v1/loops/runs/{target}")
    if run is not None:
        body = {"session_id": run["run"]["session_id"], "run_id": target}
        yield run["run"]["sampler"] or server.post("/v1/loops/samplers", body)["sampler"]
        return
    sampler = server.find(f"/v1/loops/samplers/{target}")
    if sampler is None:
        raise remote.CommandFailed(f"no run or sampler {target!r} on this server")
    yield sampler["sampler"]


def _model_of(server: remote.Server, sampler: remote.Json) -> str:
    """The first adapter that the sampler serves, else its base model."""
    models = server.get(f"{sampler['base_url']}/v1/models")["data"]
    adapters = [entry["id"] for entry in models if entry.get("parent")]
    return adapters[0] if adapters else models[0]["id"]

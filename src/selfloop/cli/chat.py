"""``selfloop chat``: talk to what a run has learned, in the terminal."""

import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from selfloop.cli import local, names, remote
from selfloop.cli.samplers import wait_until_ready

_READ_TIMEOUT_S = 600.0


def chat(
    target: Annotated[
        str,
        typer.Argument(help="A run (its newest weights), a sampler, or the path of a checkpoint (bt:// or tinker://)."),
    ],
    prompt: Annotated[str | None, typer.Option(help="Ask this once and end; `-` reads it from standard input.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    model: Annotated[
        str | None, typer.Option(help="One of the sampler's models. Default: the adapter, if any.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer. Default: all that are left.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Makes an answer repeatable.")] = None,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --prompt: print the answer with its usage.")] = False,
) -> None:
    """Chat with the newest weights of a run, with a sampler, or with a checkpoint.

    The first line says which weights answer.
    """
    if as_json and prompt is None:
        raise typer.BadParameter("needs --prompt", param_hint="--json")
    with remote.server(url, data_dir) as server, _answering(server, target) as answering:
        wait_until_ready(server, answering.sampler)
        asked: remote.Json = {"model": model or answering.model, "temperature": temperature}
        asked |= {name: v for name, v in (("max_tokens", max_tokens), ("seed", seed)) if v is not None}
        weights = answering.weights if model is None else f"model {model} of sampler {answering.sampler['id']}"
        talk = _Talk(server, answering.sampler["base_url"], asked, system, weights)
        if not as_json:
            typer.echo(f"[weights: {weights}]")
        try:
            if prompt is None:
                _converse(talk, target)
            else:
                _once(talk, sys.stdin.read() if prompt == "-" else prompt, as_json)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


@dataclass(frozen=True, slots=True)
class _Answering:
    """The sampler that is asked, for which of its models, and what weights these are, in words."""

    sampler: remote.Json
    model: str
    weights: str


class _Talk:
    """A conversation; every turn is sent whole, as the route remembers nothing."""

    def __init__(
        self, server: remote.Server, base_url: str, asked: remote.Json, system: str | None, weights: str
    ) -> None:
        self.weights = weights
        self._server = server
        self._url = f"{base_url}/v1/chat/completions"
        self._asked = asked
        self._messages: list[remote.Json] = [{"role": "system", "content": system}] if system else []
        self.usage: remote.Json = {}
        self.finish_reason: str | None = None

    def say(self, text: str) -> Iterator[str]:
        """The answer in pieces, as they are sampled."""
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
        said = {"weights": talk.weights, "text": "".join(pieces), "finish_reason": talk.finish_reason}
        said |= {"usage": talk.usage}
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
def _answering(server: remote.Server, target: str) -> Generator[_Answering]:
    """Who is to be asked. A sampler that is made for it ends with the chat."""
    checkpoint = names.find_checkpoint(server, target)
    if checkpoint is not None:
        session = server.post("/v1/loops/sessions")["session"]["id"]
        body = {"session_id": session, "model_path": checkpoint["path"]}
        made = server.post("/v1/loops/samplers", body)["sampler"]
        with _ended_after(server, made):
            yield _Answering(made, made["base_model"], f"checkpoint {target} (step {checkpoint['step']})")
        return
    run = names.find_run(server, target)
    if run is not None:
        newest = server.post(f"/v1/loops/runs/{run['id']}/newest_sampler", timeout_s=_READ_TIMEOUT_S)
        made = newest["sampler"]
        with _ended_after(server, made):
            yield _Answering(made, made["base_model"], _newest_in_words(newest["weights"]))
        return
    sampler = names.find_sampler(server, target)
    if sampler is None:
        raise remote.CommandFailed(f"no run, sampler or checkpoint {target!r} on this server")
    models = server.get(f"{sampler['base_url']}/v1/models")["data"]
    adapter = next((entry["id"] for entry in models if entry.get("parent")), None)
    yield _Answering(sampler, adapter or models[0]["id"], _served_in_words(sampler, adapter))


@contextmanager
def _ended_after(server: remote.Server, sampler: remote.Json) -> Generator[None]:
    try:
        yield
    finally:
        server.post(f"/v1/loops/samplers/{sampler['id']}/deactivate")


def _newest_in_words(weights: remote.Json) -> str:
    run, step = weights["run_id"], weights["step"]
    if weights["path"] is not None:
        return f"checkpoint {weights['path']}, the newest of run {run}, which has ended (step {step})"
    trained = "untrained: it answers as the base model" if step == 0 else "as they are now"
    return f"run {run} at step {step}, {trained}"


def _served_in_words(sampler: remote.Json, adapter: str | None) -> str:
    if adapter is not None:
        return f"checkpoint {adapter}"
    run = sampler["run_id"]
    unpublished = "" if run is None else f": run {run} has published none (`selfloop chat {run}` asks its newest)"
    return f"the base model {sampler['base_model']}{unpublished}"

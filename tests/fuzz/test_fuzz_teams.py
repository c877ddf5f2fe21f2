"""Nearly right requests to every route of every dialect, sent by everybody, about the things of one team.

Nothing ends in a 5xx, every refusal has a dialect's shape, and nobody else is ever shown a word of what the team has.
``FUZZ_REQUESTS`` sets how many are sent (``make fuzz``); without it they are few and always the same.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from every_route import NAME, ROUTES, WORD, Ask, filled, owned
from gateway import KEY, MODEL, Gateway, copy_data, ok, selfloop
from selfloop.server.tinker import schema

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "300"))
ALWAYS_THE_SAME = "FUZZ_REQUESTS" not in os.environ
# They end what the others need: a key, or the whole run.
ENDS_MUCH = {
    "DELETE /api/v1/auth/apikey/me",
    "DELETE /v1/api_keys/{key}",
    "POST /v1/loops/runs/{run_id}/deactivate",
    "POST /v1/loops/samplers/{sampler_id}/deactivate",
    "POST /v1/loops/deployments/{deployment_id}/deactivate",
    "POST /v1/models/{model_id}/deployments/{deployment_id}/deactivate",
    "POST /api/v1/unload_model",
    "POST /api/v1/sessions/{session_id}/finish",
}
OUTSIDERS = ["member elsewhere", "admin elsewhere", "wrong", "nobody"]
INSIDERS = ["owner", "reader"]
# Held by the server as long as a client would wait.
POLLS = ("/operations/", "/retrieve_future")

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["", "..", "/etc/passwd", "bt://loops:x/weights/y", "tinker://x/weights/y", "\0", "a" * 5000])
    | st.sampled_from([[], {}, [[]], {"": None}])
)


class House:
    """The team's things, and a client for each who asks."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        folder = ["--data-dir", str(gateway.data_dir)]

        def key(name: str, *options: str) -> str:
            return selfloop("keys", "create", name, *options, *folder).split()[-1]

        owner, elsewhere = gateway.http(KEY), gateway.http(key("member", "--team", "other"))
        self.ids = owned(owner, elsewhere)
        self.clients: dict[str, httpx.Client] = {
            "owner": owner,
            "reader": gateway.http(key("reader", "--role", "read-only")),
            "member elsewhere": elsewhere,
            "admin elsewhere": gateway.http(key("admin", "--team", "other", "--role", "admin")),
            "wrong": gateway.http("slk-wrong"),
            "nobody": gateway.http(None),
        }
        self.known = sorted({*self.ids.values(), MODEL, NAME})


@pytest.fixture(scope="module")
def house(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    own = Gateway(copy_data(data_template, tmp_path_factory.mktemp("teams") / "data")).start()
    yield House(own)
    own.close()


def bent(draw: st.DrawFn, value: Any, known: list[str]) -> Any:
    """The value with here and there another in its place, of the right kind or of any."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(LEAVES | st.sampled_from(known))
    if isinstance(value, dict):
        changed = {key: bent(draw, inner, known) for key, inner in value.items() if kind != 1 or draw(st.booleans())}
        return changed | ({draw(st.text(max_size=6)): draw(LEAVES)} if kind == 2 else {})
    if isinstance(value, list):
        return [bent(draw, inner, known) for inner in value * (2 if kind == 3 else 1)]
    return value


@st.composite
def requests(draw: st.DrawFn, route: str, ask: Ask, house: House) -> dict[str, Any]:
    """A request to the route, of one of those who ask."""
    method, path = route.split(" ")
    ids = dict(house.ids)
    for name in draw(st.lists(st.sampled_from(sorted(ids)), max_size=3)):
        ids[name] = draw(st.sampled_from(house.known))
    if path.startswith("/v1/models/{model_id}/deployments/{deployment_id}"):
        ids["deployment_id"] = ids["sampler_deployment_id"]
    if not draw(st.integers(0, 5)):
        ids[draw(st.sampled_from(sorted(ids)))] = draw(st.text(min_size=1, max_size=8) | st.just("../x"))
    params = {name: str(bent(draw, value, house.known)) for name, value in filled(ask.params, ids).items()}
    made: dict[str, Any] = {"method": method, "url": quote(filled(path, ids), safe="/:.~"), "params": params}
    if ask.content is not None:
        made["content"] = draw(protobuf(ids))
    elif ask.json is not None:
        # The braces of GraphQL are its own.
        body = ask.json if "query" in ask.json else filled(ask.json, ids)
        made["content"] = json.dumps(bent(draw, body, house.known)).encode()
        made["headers"] = {"Content-Type": draw(st.sampled_from(["application/json"] * 6 + ["text/plain", "x"]))}
    return made


@st.composite
def protobuf(draw: st.DrawFn, ids: dict[str, str]) -> bytes:
    """A ``ForwardBackwardRequest`` of plausible and implausible parts, or bytes that are none."""
    message = schema.ForwardBackwardRequest(
        model_id=ids["run_id"],
        seq_id=draw(st.integers(-1, 2**31 - 1)),
        loss_fn=draw(st.sampled_from(["cross_entropy", "ppo", "custom", "x", ""])),
        forward_only=draw(st.booleans()),
    )
    for _ in range(draw(st.integers(0, 2))):
        part = message.data.add()
        part.model_input.add().encoded_text.tokens = draw(st.binary(max_size=16))
        target = part.loss_fn_inputs[draw(st.sampled_from(["target_tokens", "weights", "x"]))]
        target.dense, target.dtype = draw(st.binary(max_size=24)), draw(st.sampled_from([0, 1, 2]))
        target.shape.extend(draw(st.lists(st.integers(0, 2**40), max_size=2)))
    whole = message.SerializeToString()
    cut = draw(st.integers(0, len(whole)))
    return draw(st.sampled_from([whole, whole, whole, whole[:cut], whole + b"\xff", b""]) | st.binary(max_size=20))


def check(response: httpx.Response, who: str, sent: dict[str, Any], route: str, known: list[str]) -> None:
    where = f"{who}: {route} {sent}\n{response.status_code} {response.text[:2000]}"
    assert response.status_code < 500, where
    if response.status_code >= 400 and response.headers.get("content-type") == "application/json":
        body = response.json()
        assert {"message", "error", "errors"} & body.keys(), where
    if who in OUTSIDERS:
        text = response.text
        for echoed in (*known, str(sent)):
            text = text.replace(echoed, "")
        assert WORD not in text, where
        if who in ("wrong", "nobody") and not ROUTES[route][0].keyless:
            assert response.status_code == 401, where


def test_everybody_asks_for_everything(house: House):
    cases = [(route, ask) for route, asks in ROUTES.items() if route not in ENDS_MUCH for ask in asks]
    for route, ask in cases:
        try:
            ask_about(route, ask, house, max(2, REQUESTS // len(cases)))
        except Exception as error:
            raise AssertionError(f"{route}\n{house.gateway.log[-3000:]}") from error
    assert house.clients["owner"].get("/healthz").status_code == 200
    assert ok(house.clients["owner"].get(f"/v1/loops/runs/{house.ids['run_id']}"))["run"]["id"] == house.ids["run_id"]


def ask_about(route: str, ask: Ask, house: House, num_requests: int) -> None:
    is_poll = any(poll in route for poll in POLLS)
    who_asks = OUTSIDERS if is_poll else [*OUTSIDERS, *INSIDERS, "member elsewhere"]

    @settings(
        max_examples=num_requests,
        derandomize=ALWAYS_THE_SAME,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(sent=requests(route, ask, house), who=st.sampled_from(who_asks))
    def send(sent: dict[str, Any], who: str) -> None:
        check(house.clients[who].request(**sent), who, sent, route, house.known)

    send()

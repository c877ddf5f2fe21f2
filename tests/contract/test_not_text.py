"""What is no text: bytes that are not UTF-8, and halves of surrogates, wherever a request has room for text."""

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from test_every_route import check_refused

from every_route import ROUTES, Ask, filled, owned
from gateway import KEY, Gateway

FORMS = {
    "no UTF-8": b"\xff",
    "overlong": b"\xc0\xaf",
    "cut off": b"\xe2\x82",
    "an encoded surrogate": b"\xed\xa0\x80",
    "half a surrogate": rb"\ud800",
    "the other half": rb"\udc00x",
}
MARK = "@mark@"
WITH_BODIES = [
    (route, ask) for route, asks in ROUTES.items() for ask in asks[:1] if isinstance(ask.json, dict) and not ask.admin
]


@pytest.fixture(scope="module")
def ids(http: httpx.Client, other_team: httpx.Client) -> dict[str, str]:
    return owned(http, other_team)


def marked(value: Any) -> Iterator[Any]:
    """``value`` with the mark in each of its strings in turn, and as a key of each of its objects."""
    match value:
        case str():
            yield MARK
            yield f"{value}{MARK}"
        case dict():
            yield value | {MARK: 1}
            for key, inner in value.items():
                yield from (value | {key: other} for other in marked(inner))
        case list():
            for i, inner in enumerate(value):
                yield from ([*value[:i], other, *value[i + 1 :]] for other in marked(inner))
        case _:
            pass


@pytest.mark.parametrize(("route", "ask"), WITH_BODIES, ids=[route for route, _ in WITH_BODIES])
def test_a_body_that_is_no_text_is_refused(http: httpx.Client, ids: dict[str, str], route: str, ask: Ask) -> None:
    method, path = route.split(" ")
    for body in marked(filled(ask.json, ids)):
        for name, form in FORMS.items():
            content = json.dumps(body).encode().replace(MARK.encode(), form)
            headers = {"Content-Type": "application/json"}
            response = http.request(method, filled(path, ids), content=content, headers=headers)
            assert response.status_code in (400, 422), f"{name} in {content!r}: {response.status_code} {response.text}"
            check_refused(response, response.status_code, route)


@pytest.mark.parametrize("escaped", ["%ff", "%c0%af", "%e2%82", "%ed%a0%80", "%00", "%ud800"])
def test_a_path_and_a_query_that_are_no_text_are_refused(http: httpx.Client, ids: dict[str, str], escaped: str) -> None:
    for route, asks in ROUTES.items():
        method, path = route.split(" ")
        params = re.findall(r"{\w+}", path)
        for param in params:
            at = filled(path.replace(param, f"x{escaped}"), ids)
            response = http.request(method, at, json=filled(asks[0].json, ids) if asks[0].json is not None else None)
            assert 400 <= response.status_code < 500, f"{method} {at}: {response.status_code} {response.text}"
        if method == "GET":
            names = {name for ask in asks for name in ask.params} or {"scope"}
            for name in names:
                response = http.get(f"{filled(path, ids)}?{name}={escaped}&x{escaped}={escaped}")
                assert response.status_code < 500, f"{response.url}: {response.text}"


HEADERS = ["Idempotency-Key", "X-Checkpoint-Path", "X-Min-Policy-Version", "Authorization", "X-API-Key", "Prefer",
           "Content-Encoding", "Content-Type", "Accept", "traceparent", "Host"]  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("value", [b"\xff", b"\xc0\xaf", b"caf\xc3\xa9"])
def test_a_header_that_is_no_text(gateway: Gateway, http: httpx.Client, ids: dict[str, str], name: str, value: bytes):
    sample = {"prompt": [5, 6], "max_tokens": 1}
    for path, body in ((f"/loops/samplers/{ids['sampler_id']}/sample", sample), ("/v1/loops/sessions", {})):
        headers = {"Content-Type": b"application/json", "Authorization": f"Bearer {KEY}".encode()} | {name: value}
        response = http.post(path, content=json.dumps(body), headers=headers)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            check_refused(response, response.status_code, path)


@pytest.mark.parametrize("target", [b"/v1/\xff", b"/v1/models?x=\xff", b"/v1/\xc3\xa9", b"\xff"])
def test_a_request_line_that_is_no_text(gateway: Gateway, target: bytes):
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as raw:
        raw.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := raw.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"401", b"404", b"421"), answer
    assert json.loads(body)["message"], answer

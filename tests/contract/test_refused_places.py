"""A refused operation has its place in the order all the same: the good one behind it runs at once."""

import gzip
import json
from collections.abc import Callable

import httpx
import pytest
import zstandard
from test_tinker import PROTOBUF, Wire

from gateway import Gateway, Json, Run, datum, ok, words
from selfloop.server.tinker import schema

# The order is waited for a minute where nobody knows of the refusal.
AT_ONCE_S = 30
MIB = 2**20


def unsized(body: bytes) -> bytes:
    packer = zstandard.ZstdCompressor().compressobj()
    return packer.compress(body) + packer.flush()


def packed(body: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(body)


Bend = Callable[[bytes], tuple[bytes, str | None]]
# What becomes of a good body, and the content encoding that it is sent with.
BENDS: dict[str, Bend] = {
    "not UTF-8": lambda good: (good[:-1] + b', "x": "\xff"}', None),
    "not UTF-8 in a key": lambda good: (b'{"\xff": 1, ' + good[1:], None),
    "overlong": lambda good: (b'{"x": "\xc0\xaf", ' + good[1:], None),
    "cut off character": lambda good: (b'{"x": "\xe2\x82", ' + good[1:], None),
    "half a surrogate": lambda good: (rb'{"x": "\ud800", ' + good[1:], None),
    "half a surrogate in a key": lambda good: (rb'{"\ud800": 1, ' + good[1:], None),
    "NaN": lambda good: (b'{"x": NaN, ' + good[1:], None),
    "infinity": lambda good: (b'{"x": [-Infinity, 1e999], ' + good[1:], None),
    "an unknown field": lambda good: (b'{"x": {"seq_id": 99, "model_id": "y"}, ' + good[1:], None),
    "its end is missing": lambda good: (good[:-1] + b', "x": [1, 2, "', None),
    "more behind it": lambda good: (good + b"}}", None),
    "too deep": lambda good: (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + good[1:], None),
    "too large": lambda good: (b'{"x": "' + b'\\"x' * (9 * MIB) + b'", ' + good[1:], None),
    "a coding that is not taken": lambda good: (gzip.compress(good), "gzip"),
    "no such coding": lambda good: (good, "br"),
    "plain, and called zstd": lambda good: (good, "zstd"),
    "zstd that states no size": lambda good: (unsized(good), "zstd"),
    "zstd whose end is missing": lambda good: (packed(good + b" " * 300_000)[:-4], "zstd"),
    "too large once unpacked": lambda good: (packed(b'{"x": "' + b"x" * 30 * MIB + b'", ' + good[1:]), "zstd"),
}


class LoopsPlaces:
    """One run through the Loops dialect."""

    def __init__(self, http: httpx.Client) -> None:
        self.run = Run.create(http).attached()

    def send(self, kind: str, body: bytes, encoding: str | None = None) -> httpx.Response:
        headers = {} if encoding is None else {"Content-Encoding": encoding}
        return self.run.http.post(f"{self.run.path}/{kind}", content=body, headers=headers)

    def good(self, **fields: object) -> bytes:
        self.run.seq += 1
        return json.dumps(fields | {"run_id": self.run.id, "seq_id": self.run.seq}).encode()

    def check_goes_on(self) -> None:
        operation = self.run.submit("optim_step", adam_params={"learning_rate": 0.0})
        assert self.run.outcome(operation, AT_ONCE_S)["status"] == "done"


class TinkerPlaces:
    """One run through the Tinker dialect."""

    def __init__(self, gateway: Gateway) -> None:
        self.wire = Wire(gateway)
        self.model = self.wire.model(self.wire.session())
        self.seq = 0

    def send(self, kind: str, body: bytes, encoding: str | None = None) -> httpx.Response:
        headers = {} if encoding is None else {"Content-Encoding": encoding}
        return self.wire.http.post(f"/api/v1/{kind}", content=body, headers=headers)

    def good(self, **fields: object) -> bytes:
        self.seq += 1
        return json.dumps(fields | {"model_id": self.model, "seq_id": self.seq}).encode()

    def check_goes_on(self) -> None:
        self.seq += 1
        future = self.wire.step(self.model, self.seq, 0.0)
        response = self.wire.http.post("/api/v1/retrieve_future", json=future)
        assert response.status_code == 200, response.text
        assert "error" not in response.json(), response.text


@pytest.fixture(scope="module", params=["loops", "tinker"])
def places(request: pytest.FixtureRequest, gateway: Gateway, http: httpx.Client) -> LoopsPlaces | TinkerPlaces:
    return LoopsPlaces(http) if request.param == "loops" else TinkerPlaces(gateway)


KINDS: dict[str, dict[str, Json]] = {
    "loops": {
        "forward": {"data": [datum(words(1))]},
        "forward_backward": {"data": [datum(words(1))]},
        "optim_step": {"adam_params": {}},
        "save_state": {"name": "x"},
        "save_weights_for_sampler": {"name": "x"},
        "load_state": {"path": "bt://loops:r/weights/x"},
        "load_state_with_optimizer": {"path": "bt://loops:r/weights/x"},
    },
    "tinker": {
        "optim_step": {"adam_params": {}},
        "save_weights": {"path": "x"},
        "save_weights_for_sampler": {"path": "x"},
        "save_weights_external": {"path": "x"},
        "load_weights": {"path": "tinker://x/weights/x", "optimizer": False},
    },
}


def kinds(places: LoopsPlaces | TinkerPlaces) -> dict[str, Json]:
    return KINDS["loops" if isinstance(places, LoopsPlaces) else "tinker"]


@pytest.mark.parametrize("bend", BENDS)
def test_whatever_is_wrong_with_a_body(places: LoopsPlaces | TinkerPlaces, bend: str) -> None:
    body, encoding = BENDS[bend](places.good(adam_params={}))
    response = places.send("optim_step", body, encoding)
    assert response.status_code in (400, 413, 422), response.text
    assert response.json()["details"]["reason"]
    again = places.send("optim_step", body, encoding)
    assert (again.status_code, again.json()) == (response.status_code, response.json())
    places.check_goes_on()
    late = places.send("optim_step", body, encoding)
    assert (late.status_code, late.json()) == (response.status_code, response.json())


@pytest.mark.parametrize("wrong", [{"grad_clip_norm": None}, {"learning_rate": "1"}, {"beta1": 2.0}, {"x": 1}])
def test_a_field_that_is_refused_while_decoding_or_after(places: LoopsPlaces | TinkerPlaces, wrong: Json) -> None:
    """JSON has no NaN and no infinity: clients write null for them."""
    assert places.send("optim_step", places.good(adam_params=wrong)).status_code in (200, 400, 422)
    places.check_goes_on()


def test_every_kind_of_operation(places: LoopsPlaces | TinkerPlaces) -> None:
    for kind, fields in kinds(places).items():
        for bad in (b'{"x": "\xff", ', b'{"y": 1, ', rb'{"\udc00": 1, '):
            response = places.send(kind, bad + places.good(**fields)[1:])
            assert response.status_code in (400, 422), f"{kind}: {response.text}"
        places.check_goes_on()


def test_what_is_refused_for_what_is_there(http: httpx.Client, gateway: Gateway) -> None:
    """A path of nowhere, another run's id, a used idempotency key: refused after the body was understood."""
    places = LoopsPlaces(http)
    run = places.run
    path = f"bt://loops:{run.id}/weights/later"
    refused = places.good(path=path)
    first = places.send("load_state", refused)
    assert first.status_code == 404, first.text
    places.check_goes_on()
    assert run.save("later") == path
    repeated = places.send("load_state", refused)
    assert (repeated.status_code, repeated.json()) == (404, first.json()), "the same request has the same answer"
    for field in ({"run_id": "other"}, {"model": "no/such"}):
        run.seq += 1
        body = {"adam_params": {}, "seq_id": run.seq, "run_id": run.id} | field
        assert http.post(f"{run.path}/optim_step", json=body).status_code in (404, 422)
        places.check_goes_on()


@pytest.mark.parametrize("bad", ["loss_fn", "cut off", "group", "json", "zstd", "fields"])
def test_protobuf_that_is_refused(gateway: Gateway, bad: str) -> None:
    places = TinkerPlaces(gateway)
    places.seq += 1
    message = schema.ForwardBackwardRequest(model_id=places.model, seq_id=places.seq, loss_fn="cross_entropy")
    good: bytes = message.SerializeToString()
    body = {
        "loss_fn": schema.ForwardBackwardRequest(model_id=places.model, seq_id=places.seq).SerializeToString(),
        "cut off": good + b"\x1a\x7f\x01",
        "group": good + b"\x7b",
        "json": json.dumps({"model_id": places.model, "seq_id": places.seq, "data": []}).encode(),
        "zstd": packed(good + b"\x22\x02\xff\xfe")[:-1],
        "fields": good + b"\x40\x01" * (2**20 + 1),
    }[bad]
    coding = {"Content-Encoding": "zstd"} if bad == "zstd" else {}
    response = places.wire.http.post("/api/v1/forward_backward", content=body, headers=PROTOBUF | coding)
    assert response.status_code in (200, 400), response.text
    places.check_goes_on()


def test_a_key_that_may_only_read_takes_no_place(http: httpx.Client, gateway: Gateway) -> None:
    run = Run.create(http).attached()
    key = ok(http.post("/v1/api_keys", json={"name": "reads", "role": "read-only"}))["api_key"]
    body = {"adam_params": {"x": 1}, "seq_id": run.seq + 1}
    assert gateway.http(key).post(f"{run.path}/optim_step", json=body).status_code == 403
    assert run.step()["metrics"]["step"] == 1

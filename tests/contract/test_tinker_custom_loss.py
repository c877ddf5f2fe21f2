"""Uploaded losses on the wire: what is kept, for whom, and what outlives a restart."""

from array import array
from collections.abc import Callable

import httpx
import pytest
from test_tinker import PROTOBUF, Wire

from gateway import Gateway, Json, ok, words
from selfloop.server.tinker import schema

SYSTEM = {"op": "call_function", "name": "loss", "target": "os.system", "args": ["true"]}


def graph(factor: float = -1.0) -> list[Json]:
    """The sum of logprobs times ``factor``."""
    total = {"tuple": [{"ref": "loss"}, {"dict": {"custom/total:mean": {"ref": "loss"}}}]}
    return [
        {"op": "placeholder", "name": "lp", "target": "logprobs"},
        {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "lp"}]},
        {"op": "call_function", "name": "loss", "target": "operator.mul", "args": [{"ref": "total"}, factor]},
        {"op": "output", "name": "output", "target": "output", "args": [total]},
    ]


def create(wire: Wire, session: str, nodes: list[Json], number: int = 0) -> httpx.Response:
    body = {
        "session_id": session,
        "custom_loss_seq_id": number,
        "name": "f",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {"format": 1, "nodes": nodes},
        "type": "create_custom_loss",
    }
    return wire.http.post("/api/v1/create_custom_loss", json=body)


def uploaded(wire: Wire, session: str) -> str:
    return wire.result(ok(create(wire, session, graph())))["loss_id"]


def submit(wire: Wire, model: str, seq: int, loss_id: str) -> Json:
    message = schema.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="custom")
    message.loss_fn_config_v2["loss_id"].text = loss_id
    for seed in (1, 2):
        tokens = words(seed)
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = array("i", tokens[:-1]).tobytes()
        targets = datum.loss_fn_inputs["target_tokens"]
        targets.dense, targets.dtype = array("q", tokens[1:]).tobytes(), schema.INT64
    return ok(wire.http.post("/api/v1/forward_backward", content=message.SerializeToString(), headers=PROTOBUF))


def metrics(wire: Wire, future: Json) -> dict[str, float]:
    message = schema.ForwardBackwardOutput()
    message.ParseFromString(wire.poll(future).content)
    return dict(message.metrics)


def test_a_loss_is_computed_and_outlives_a_restart(new_gateway: Callable[[], Gateway]):
    gateway = new_gateway()
    wire = Wire(gateway)
    session = wire.session()
    model = wire.model(session)
    loss_id = uploaded(wire, session)
    before = metrics(wire, submit(wire, model, 1, loss_id))
    built_in = wire.loss_sum(wire.loss(model, 2, 1, 2))
    assert before["loss:sum"] == pytest.approx(built_in, rel=1e-5)
    assert before["custom/total:mean"] == pytest.approx(built_in / 2, rel=1e-5)
    gateway.kill()
    gateway.start()
    wire = Wire(gateway)
    assert metrics(wire, submit(wire, model, 3, loss_id)) == before


def test_the_same_again_is_the_same_and_another_is_refused(gateway: Gateway):
    wire = Wire(gateway)
    session = wire.session()
    assert uploaded(wire, session) == uploaded(wire, session)
    assert create(wire, session, graph(2.0)).status_code == 400
    refused = create(wire, session, [graph()[0], SYSTEM, graph()[3]], number=1)
    assert refused.status_code == 400
    assert refused.json()["details"]["field"] == "graph.nodes[1]"
    assert "'os.system' is not among" in refused.json()["detail"]


def test_a_loss_belongs_to_its_session(gateway: Gateway, other_team: httpx.Client):
    wire = Wire(gateway)
    session, other_session = wire.session(), wire.session()
    loss_id = uploaded(wire, session)
    failed = ok(wire.poll(submit(wire, wire.model(other_session), 1, loss_id)))
    assert failed["category"] == "user"
    assert "loss_id" in failed["error"]
    stranger = Wire(gateway, other_team.headers["Authorization"].removeprefix("Bearer "))
    assert create(stranger, session, graph(), number=5).status_code == 404
    asked = {"request_id": f"create_custom_loss/{session}/0"}
    assert stranger.http.post("/api/v1/retrieve_future", json=asked).status_code == 404

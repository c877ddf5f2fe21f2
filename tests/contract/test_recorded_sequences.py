"""Recorded sequences: sampled with ``record_stability_info``, named by training data, and held to the record."""

import sqlite3
from array import array
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from test_tinker import Wire

from gateway import MODEL, Gateway, Json, Run, ok
from selfloop.server.tinker import schema

PROMPT = [5, 6, 7, 8]
Spans = list[tuple[str, str, int, int]]


@pytest.fixture(scope="module")
def wire(gateway: Gateway) -> Wire:
    return Wire(gateway)


class Trained:
    """A model of the Tinker dialect, a sampler of it, and what it sampled for ``PROMPT``."""

    def __init__(self, wire: Wire, *, recorded: bool = True) -> None:
        self.wire = wire
        session = wire.session()
        self.model = wire.model(session)
        saved = wire.result(
            wire.post("/api/v1/save_weights_for_sampler", model_id=self.model, seq_id=1, sampling_session_seq_id=0)
        )
        self.sampler = saved["sampling_session_id"]
        self.seq = 1
        future = ok(
            wire.sample(
                self.sampler,
                1,
                prompt={"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
                num_samples=2,
                sampling_params={"max_tokens": 6, "temperature": 1.0, "seed": 3, "stop": []},
                record_stability_info=recorded,
            )
        )
        self.ids: list[str] = future["sample_sequence_ids"]
        message = schema.SampleResponse()
        message.ParseFromString(wire.poll(future).content)
        self.tokens = [array("i", s.tokens).tolist() for s in message.sequences]
        self.logprobs = [array("f", s.logprobs).tolist() for s in message.sequences]

    def datum(
        self, request: Any, index: int = 0, *, logprobs: bool = False, advantages: list[float] | None = None
    ) -> Any:
        """The prompt and the sequence, shifted, with the spans that are true of it."""
        datum = request.data.add()
        whole, n = PROMPT + self.tokens[index], len(self.tokens[index])
        datum.model_input.add().encoded_text.tokens = array("i", whole[:-1]).tobytes()
        dense(datum, "target_tokens", array("q", whole[1:]), schema.INT64)
        given = [0.0] * (len(PROMPT) - 1) + [1.0] * n if advantages is None else advantages
        dense(datum, "advantages", array("f", given), schema.FLOAT32)
        if logprobs:
            own = [0.0] * (len(PROMPT) - 1) + self.logprobs[index]
            dense(datum, "logprobs", array("f", own), schema.FLOAT32)
        id = self.ids[index]
        say(datum.model_input_spans, [("prompt", id, 0, len(PROMPT)), ("sampled", id, 0, n - 1)])
        say(datum.loss_fn_input_spans, [("prompt", id, 1, len(PROMPT) - 1), ("sampled", id, 0, n)])
        return datum

    def train(self, build: Callable[[Any], object], loss: str = "stable_reinforce") -> httpx.Response:
        self.seq += 1
        request = schema.ForwardBackwardRequest(model_id=self.model, seq_id=self.seq, loss_fn=loss)
        build(request)
        response = self.wire.http.post(
            "/api/v1/forward_backward",
            content=request.SerializeToString(),
            headers={"Content-Type": "application/x-protobuf"},
        )
        return self.wire.poll(ok(response))


def dense(datum: Any, name: str, values: "array[Any]", dtype: int) -> None:
    tensor = datum.loss_fn_inputs[name]
    tensor.dense, tensor.dtype = values.tobytes(), dtype
    tensor.shape.append(len(values))


def say(field: Any, spans: Spans) -> None:
    del field[:]
    for kind, id, offset, length in spans:
        span = getattr(field.add(), f"{kind}_tokens")
        span.sequence_id, span.offset, span.length = id, offset, length


def loss_of(response: httpx.Response) -> float:
    assert "protobuf" in response.headers["content-type"], response.text
    message = schema.ForwardBackwardOutput()
    message.ParseFromString(response.content)
    return message.metrics["loss:sum"]


def refused(response: httpx.Response, *words: str) -> None:
    assert "protobuf" not in response.headers["content-type"]
    for word in words:
        assert word in response.text, response.text


def test_recorded_logprobs_are_used_where_the_data_has_none(wire: Wire):
    trained = Trained(wire)
    own = loss_of(trained.train(lambda request: trained.datum(request, logprobs=True)))
    filled = loss_of(trained.train(lambda request: trained.datum(request)))
    assert filled == pytest.approx(own, rel=1e-6)
    assert own != 0
    # Any loss that takes the sampler's logprobs does so.
    own = loss_of(trained.train(lambda request: trained.datum(request, 1, logprobs=True), "importance_sampling"))
    assert loss_of(trained.train(lambda request: trained.datum(request, 1), "importance_sampling")) == pytest.approx(
        own
    )


@pytest.mark.parametrize("loss", ["stable_reinforce", "importance_sampling"])
def test_tokens_that_were_not_recorded_so_are_refused(wire: Wire, loss: str):
    trained = Trained(wire)

    def other_token(request: Any) -> None:
        datum = trained.datum(request, logprobs=True)
        whole = PROMPT + trained.tokens[0]
        whole[-2] = (whole[-2] + 1) % 200
        datum.model_input[0].encoded_text.tokens = array("i", whole[:-1]).tobytes()

    def other_sequence(request: Any) -> None:
        datum = trained.datum(request, logprobs=True)
        id, n = trained.ids[1], len(trained.tokens[0])
        say(datum.loss_fn_input_spans, [("prompt", id, 1, len(PROMPT) - 1), ("sampled", id, 0, n)])

    def shifted(request: Any) -> None:
        datum = trained.datum(request, logprobs=True)
        id, n = trained.ids[0], len(trained.tokens[0])
        say(datum.model_input_spans, [("prompt", id, 0, len(PROMPT)), ("sampled", id, 1, n - 1)])

    for build, field in (
        (other_token, "model_input_spans"),
        (other_sequence, "loss_fn_input_spans"),
        (shifted, "model_input_spans"),
    ):
        refused(trained.train(build, loss), f"data[0].{field}[1]", "the tokens that were recorded")


def test_spans_cover_the_tokens_within_their_sequences(wire: Wire):
    trained = Trained(wire)
    id, n = trained.ids[0], len(trained.tokens[0])
    for spans, word in (
        ([("prompt", id, 0, len(PROMPT))], "spans that cover all"),
        ([("prompt", id, 0, len(PROMPT)), ("sampled", id, 0, n)], "this one goes beyond"),
        ([("prompt", id, 0, len(PROMPT)), ("sampled", id, 5, n - 1)], "within the 6 sampled tokens"),
        ([("prompt", id, 0, len(PROMPT) + 1), ("sampled", id, 0, n - 2)], "within the 4 prompt"),
        ([("prompt", id, -1, len(PROMPT)), ("sampled", id, 0, n - 1)], "offset"),
        ([("prompt", id, 0, len(PROMPT)), ("sampled", id, 0, -1)], "length"),
    ):

        def build(request: Any, spans: Spans = spans) -> None:
            say(trained.datum(request, logprobs=True).model_input_spans, spans)

        refused(trained.train(build), "data[0].model_input_spans", word)

    def one_sided(request: Any) -> None:
        del trained.datum(request, logprobs=True).loss_fn_input_spans[:]

    refused(trained.train(one_sided), "loss_fn_input_spans", "with model_input_spans")


def test_what_was_not_recorded_is_refused_where_the_record_is_needed(wire: Wire):
    trained = Trained(wire, recorded=False)
    refused(
        trained.train(lambda request: trained.datum(request, logprobs=True)), "sequence_id", "record_stability_info"
    )
    # For other losses the spans of such a sequence are words.
    loss_of(trained.train(lambda request: trained.datum(request, logprobs=True), "importance_sampling"))
    refused(trained.train(lambda request: trained.datum(request), "importance_sampling"), "logprobs", "not recorded")


def test_a_prompt_that_counts_needs_its_logprob(wire: Wire):
    trained = Trained(wire)
    ones = [1.0] * (len(PROMPT) - 1 + len(trained.tokens[0]))
    refused(trained.train(lambda request: trained.datum(request, advantages=ones)), "logprobs", "a prompt")


@pytest.mark.parametrize("id", ["", "nothing", "aaaaaaa:sample:0/0/0", "a/b", "a/b/c/d", "a/b/-1", "a/b/99999999999"])
@pytest.mark.parametrize("loss", ["stable_reinforce", "importance_sampling"])
def test_other_ids_are_refused(wire: Wire, id: str, loss: str):
    trained = Trained(wire)

    def build(request: Any) -> None:
        datum = trained.datum(request, logprobs=True)
        datum.model_input_spans[0].prompt_tokens.sequence_id = id

    refused(trained.train(build, loss), "data[0].model_input_spans[0].sequence_id", "your team sampled")


def test_another_teams_sequences_are_refused(wire: Wire, gateway: Gateway, other_team: httpx.Client):
    mine = Trained(wire)
    theirs = Trained(Wire(gateway, other_team.headers["Authorization"].removeprefix("Bearer ")))

    def build(request: Any) -> None:
        datum = mine.datum(request, logprobs=True)
        datum.model_input_spans[0].prompt_tokens.sequence_id = theirs.ids[0]

    refused(mine.train(build), "sequence_id", "your team sampled")


def test_a_record_lasts_a_day_and_each_use_begins_it_anew(new_gateway: Callable[[], Gateway]):
    gateway = new_gateway()
    trained = Trained(Wire(gateway))

    def let_pass(hours: float) -> None:
        with sqlite3.connect(next(gateway.data_dir.glob("*.db"))) as rows:
            rows.execute("UPDATE recorded_samples SET expires_at = expires_at - ?", (hours * 3600,))

    for _ in range(3):
        let_pass(20)
        loss_of(trained.train(lambda request: trained.datum(request)))
    gateway.terminate()
    gateway.start(None)
    trained.wire = Wire(gateway)
    loss_of(trained.train(lambda request: trained.datum(request)))
    let_pass(24.1)
    refused(trained.train(lambda request: trained.datum(request)), "sequence_id", "its day is over")


# -- Loops ------------------------------------------------------------------------------------------------


def span(kind: str, id: str, offset: int, length: int) -> Json:
    return {"type": f"{kind}_tokens", "sequence_id": id, "offset": offset, "length": length}


@pytest.mark.parametrize("queued", [False, True], ids=["direct", "queued"])
def test_the_loops_data_plane_records_and_checks_the_same(http: httpx.Client, queued: bool):
    run = Run.create(http).attached()
    url = run.resource["sampler"]["base_url"]
    body = {"prompt": PROMPT, "n": 2, "max_tokens": 6, "logprobs": 0, "record_stability_info": True}
    if queued:
        accepted = ok(http.post(url + "/sample", json=body, headers={"Prefer": "respond-async"}), 202)
        answer = ok(http.get(f"{url}/operations/{accepted['operation_id']}"))["result"]
    else:
        answer = ok(http.post(url + "/sample", json=body))
    choice = answer["choices"][1]
    id, tokens, sampled = choice["sequence_id"], choice["token_ids"], choice["logprobs"]["token_logprobs"]
    assert id != answer["choices"][0]["sequence_id"]
    whole, n = PROMPT + tokens, len(tokens)

    def tensor(values: list[Any], dtype: str) -> Json:
        return {"data": values, "dtype": dtype, "shape": [len(values)]}

    prompt = [0.0] * (len(PROMPT) - 1)
    datum: Json = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": whole[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": tensor(whole[1:], "int64"),
            "advantages": tensor(prompt + [1.0] * n, "float32"),
        },
        "model_input_spans": [span("prompt", id, 0, len(PROMPT)), span("sampled", id, 0, n - 1)],
        "loss_fn_input_spans": [span("prompt", id, 1, len(PROMPT) - 1), span("sampled", id, 0, n)],
    }
    with_own = datum | {"loss_fn_inputs": datum["loss_fn_inputs"] | {"logprobs": tensor(prompt + sampled, "float32")}}
    losses = [run.do("forward", data=[d], loss_fn="importance_sampling")["loss"] for d in (datum, with_own)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    for changed, field in (
        ({"model_input_spans": datum["model_input_spans"][:1]}, "data[0].model_input_spans"),
        ({"loss_fn_input_spans": None}, "data[0].loss_fn_input_spans"),
        (
            {"model_input_spans": [span("prompt", "x/y/0", 0, len(whole) - 1)]},
            "data[0].model_input_spans[0].sequence_id",
        ),
        ({"model_input_spans": [span("sampled", id, 0, len(whole) - 1)]}, "data[0].model_input_spans[0].length"),
    ):
        response = run.post("forward", data=[datum | changed], loss_fn="importance_sampling")
        assert (response.status_code, response.json()["details"]["field"]) == (422, field), response.text


def test_without_asking_nothing_is_recorded(http: httpx.Client):
    run = Run.create(http, base_model=MODEL).attached()
    answer = ok(http.post(run.resource["sampler"]["base_url"] + "/sample", json={"prompt": PROMPT, "max_tokens": 2}))
    assert "sequence_id" not in answer["choices"][0]

"""Sampling and futures of the Tinker client on the wire: batched polls, cancellation, clones, ends of sessions."""

import math
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest
import zstandard
from test_tinker import PROTOBUF, Wire

from gateway import KEY, MAX_POSITIONS, MODEL, Gateway, Json, ok, until, words
from selfloop.server.shared.body import MAX_BODY_BYTES
from selfloop.server.tinker import schema

LONG = {"sampling_params": {"max_tokens": 200, "stop": []}, "num_samples": 64}


@pytest.fixture(scope="module")
def wire(gateway: Gateway) -> Wire:
    return Wire(gateway)


@pytest.fixture(scope="module")
def sampler(wire: Wire) -> str:
    return base_sampler(wire, wire.session())


def base_sampler(wire: Wire, session: str, number: int = 0) -> str:
    body = {"session_id": session, "sampling_session_seq_id": number, "base_model": MODEL}
    return wire.post("/api/v1/create_sampling_session", **body)["sampling_session_id"]


def ended(wire: Wire, sampler: str, cursor: int = 0, clone: int = 0, **fields: object) -> Json:
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": clone}
    return wire.post("/api/v1/retrieve_futures", target=target, prev_cursor=cursor, **fields)


def response_of(wire: Wire, future: Json) -> schema.SampleResponse:
    response = wire.poll(future)
    assert response.headers["content-type"] == "application/x-protobuf", response.text
    message = schema.SampleResponse()
    message.ParseFromString(response.content)
    return message


def asked(wire: Wire, sampler: str, seq: int, **fields: object) -> schema.SampleResponse:
    return response_of(wire, ok(wire.sample(sampler, seq, **fields)))


def test_batched_polls_report_each_end_once(wire: Wire, sampler: str):
    sampler = base_sampler(wire, wire.session())
    futures = {ok(wire.sample(sampler, seq))["request_id"] for seq in range(20)}
    reported: list[str] = []
    cursor = 0
    while len(reported) < len(futures):
        answer = ended(wire, sampler, cursor)
        assert answer["cursor"] >= cursor
        cursor = answer["cursor"]
        reported += [one["request_id"] for one in answer["completions"]]
        for one in answer["completions"]:
            assert one["state"] == "finished"
            content = wire.poll(one).content
            assert len(content) == one["response_payload_uncompressed_size"]
    assert set(reported) == futures
    assert len(reported) == len(futures)
    assert ended(wire, sampler, cursor, timeout=0) == {"completions": [], "cursor": cursor}


def test_an_acknowledged_result_is_dropped(wire: Wire):
    sampler = base_sampler(wire, wire.session())
    kept, future = ok(wire.sample(sampler, 0)), ok(wire.sample(sampler, 1))
    for each in (kept, future):
        assert wire.poll(each).status_code == 200
    other = ended(wire, sampler, clone=3, timeout=0, retrieved_request_ids=[kept["request_id"]])
    assert other["completions"] == []
    ended(wire, sampler, timeout=0, retrieved_request_ids=[future["request_id"], "sample/nonsense"])
    assert wire.poll(future).status_code == 410
    assert wire.poll(kept).status_code == 200


def test_clones_have_numbers_and_polls_of_their_own(wire: Wire):
    sampler = base_sampler(wire, wire.session())
    first, second = (
        wire.post("/api/v1/join_sampling_session", sampling_session_id=sampler)["client_counter"] for _ in range(2)
    )
    assert second == first + 1
    future = ok(wire.sample(sampler, second * 10**9 + 7))
    assert wire.poll(future).status_code == 200
    assert [one["request_id"] for one in ended(wire, sampler, clone=second)["completions"]] == [future["request_id"]]
    assert ended(wire, sampler, clone=first, timeout=0)["completions"] == []
    assert wire.poll(ok(wire.sample(sampler, 10**18))).status_code == 200


def test_a_cancelled_sample_leaves_the_engine(wire: Wire, sampler: str):
    future = ok(wire.sample(sampler, 50, **LONG))
    body = {"request_id": future["request_id"], "allow_metadata_only": True}
    wire.post("/api/v1/cancel_future", request_id=future["request_id"])
    gone = until(
        lambda: (r := wire.http.post("/api/v1/retrieve_future", json=body)).status_code != 408 and r, "it ends"
    )
    assert gone.status_code == 410
    wire.post("/api/v1/cancel_future", request_id=future["request_id"])
    refused = wire.http.post("/api/v1/cancel_future", json={"request_id": "operation/abc1234/1"})
    assert refused.status_code == 400


def test_other_teams_see_nothing(wire: Wire, sampler: str, other_team: httpx.Client):
    future = ok(wire.sample(sampler, 55))
    for route, body in (
        ("retrieve_futures", {"target": {"type": "sampling_session", "sampling_session_id": sampler}}),
        ("cancel_future", {"request_id": future["request_id"]}),
        ("join_sampling_session", {"sampling_session_id": sampler}),
    ):
        response = other_team.post(f"/api/v1/{route}", json=body)
        assert response.status_code == 404, route
        assert response.json()["detail"]
    assert wire.poll(future).status_code == 200


def test_targets_in_both_layouts(wire: Wire, sampler: str):
    prompt = words(1)
    rows = len(prompt) - 1
    dense = [token for i in range(rows) for token in (prompt[i + 1], -1, 5)]
    fields = {"sampling_params": {"max_tokens": 1}, "num_samples": 1, "prompt_logprobs": True}
    tensor = {"data": dense, "dtype": "int64", "shape": [rows, 3]}
    message = asked(wire, sampler, 60, target_prompt_logprobs=tensor, **fields)
    own = array("f", message.prompt_logprobs)
    values = array("f", message.target_prompt_logprobs.dense)
    assert list(message.target_prompt_logprobs.shape) == [rows, 3]
    assert message.target_prompt_logprobs.dtype == schema.FLOAT32
    assert list(values[0::3]) == pytest.approx(list(own[1:]), abs=1e-6)
    assert set(values[1::3]) == {0.0}

    crow = [0, *[0] * (rows - 1), 2]
    sparse = {"data": [5, prompt[-1]], "dtype": "int64", "shape": [rows, 300]}
    sparse |= {"sparse_crow_indices": crow, "sparse_col_indices": [299, 3]}
    csr = asked(wire, sampler, 61, target_prompt_logprobs=sparse, **fields).target_prompt_logprobs.sparse_csr
    assert list(array("f", csr.values)) == pytest.approx([values[-1], values[-3]], abs=1e-6)
    assert list(array("q", csr.crow_indices)) == crow
    assert list(array("q", csr.col_indices)) == [299, 3]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"shape": [3, 1]}, "shape"),
        ({"shape": None}, "shape"),
        ({"dtype": "float32"}, "dtype"),
        ({"data": [10**6] * 7}, "data"),
        ({"data": [-1] * 7}, "data"),
        ({"data": [1]}, "data"),
        ({"sparse_crow_indices": [0] * 8}, "sparse_col_indices"),
        ({"sparse_crow_indices": [0] * 8, "sparse_col_indices": [0] * 7}, "sparse_crow_indices"),
        ({"sparse_crow_indices": [0, 5, 2, 3, 4, 5, 6, 7], "sparse_col_indices": [0] * 7}, "sparse_crow_indices"),
        ({"sparse_crow_indices": [*range(8)], "sparse_col_indices": [1] * 7}, "sparse_col_indices"),
    ],
)
def test_wrong_targets_are_refused(wire: Wire, sampler: str, change: Json, field: str):
    prompt = {"chunks": [{"type": "encoded_text", "tokens": list(range(3, 11))}]}
    tensor = {"data": [4] * 7, "dtype": "int64", "shape": [7, 1]} | change
    response = wire.sample(sampler, 70, prompt=prompt, target_prompt_logprobs=tensor)
    assert response.status_code == 400, response.text
    assert f"target_prompt_logprobs.{field}" in response.json()["detail"]


def test_alternatives_to_the_prompt(wire: Wire, sampler: str):
    rows = len(words(1)) - 1
    fields = {"num_samples": 1, "prompt_alt_tokens_k": 6}
    greedy = {"sampling_params": {"max_tokens": 1, "temperature": 0.0}}
    message = asked(wire, sampler, 80, topk_prompt_logprobs=1, **fields, **greedy)
    likeliest = array("i", message.topk_prompt_logprobs.token_ids)[1:]
    alternatives = message.prompt_alt_tokens
    assert list(alternatives.tokens.shape) == list(alternatives.logprobs.shape) == [rows, 6]
    assert alternatives.tokens.dtype == schema.INT32
    assert list(array("i", alternatives.tokens.dense)) == [token for token in likeliest for _ in range(6)]
    sampled = [asked(wire, sampler, seq, **fields, sampling_params={"max_tokens": 1, "seed": 4}) for seq in (81, 82)]
    assert sampled[0].prompt_alt_tokens == sampled[1].prompt_alt_tokens
    assert all(value < 0 for value in array("f", sampled[0].prompt_alt_tokens.logprobs.dense))


def test_only_the_last_positions(wire: Wire, sampler: str):
    fields = {"num_samples": 1, "prompt_logprobs": True, "topk_prompt_logprobs": 2}
    everything = array("f", asked(wire, sampler, 90, **fields).prompt_logprobs)
    message = asked(wire, sampler, 91, prompt_logprobs_last_n=2, **fields)
    last = array("f", message.prompt_logprobs)
    assert len(last) == len(everything)
    assert all(map(math.isnan, last[:-2]))
    assert list(last[-2:]) == pytest.approx(list(everything[-2:]), abs=5e-6)  # a few roundings of float32
    top = array("f", message.topk_prompt_logprobs.logprobs)
    assert set(top[:-4]) == {-99999.0}
    assert all(value > -99999.0 for value in top[-4:])


@pytest.mark.parametrize("fields", [{"prompt_logprobs": True}, {"topk_prompt_logprobs": 2}, {"prompt_alt_tokens_k": 2}])
def test_a_prompt_that_fills_the_model_is_scored(wire: Wire, sampler: str, fields: Json):
    """The SDK's compute_logprobs asks so, for one token that it drops."""
    full = {"chunks": [{"type": "encoded_text", "tokens": [3 + i % 20 for i in range(MAX_POSITIONS)]}]}
    one = {"prompt": full, "sampling_params": {"max_tokens": 1}, "num_samples": 1}
    place = 300 + len(next(iter(fields)))
    message = asked(wire, sampler, place, **one, **fields)
    if "prompt_logprobs" in fields:
        logprobs = array("f", message.prompt_logprobs)
        assert len(logprobs) == MAX_POSITIONS
        assert all(-50 < value < 0 for value in logprobs[1:])
    refused = wire.sample(sampler, place + 100, **one)
    assert refused.status_code == 400
    assert f"at most {MAX_POSITIONS - 1} tokens" in refused.json()["detail"]


def test_too_long_a_sample_is_refused(wire: Wire, sampler: str):
    response = wire.sample(sampler, 95, sampling_params={"max_tokens": 10**6})
    assert response.status_code == 400
    assert "max_tokens" in response.json()["detail"]


def compressed(wire: Wire, body: bytes) -> Json:
    headers = PROTOBUF | {"Content-Encoding": "zstd"}
    response = wire.http.post("/api/v1/forward_backward", content=body, headers=headers)
    return {"status": response.status_code, "body": response.json()}


def test_compressed_bodies(wire: Wire, gateway: Gateway):
    model = wire.model(wire.session())
    message = schema.ForwardBackwardRequest(model_id=model, seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = array("i", words(1)[:-1]).tobytes()
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = array("q", words(1)[1:]).tobytes(), schema.INT64
    whole = zstandard.ZstdCompressor().compress(message.SerializeToString())
    future = compressed(wire, whole)
    assert future["status"] == 200, future
    assert wire.loss_sum(future["body"]) > 0

    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(40 * MAX_BODY_BYTES))
    before = memory_of(gateway)
    assert compressed(wire, bomb)["status"] == 413
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(40 * MAX_BODY_BYTES))
    for wrong in (unsized, whole[:-3], whole + b"x", b"no zstd", b""):
        assert compressed(wire, wrong)["status"] == 400, wrong[:10]
    until(lambda: memory_of(gateway) - before < MAX_BODY_BYTES, "what was unpacked is given back")
    other = wire.http.post("/api/v1/forward_backward", content=whole, headers=PROTOBUF | {"Content-Encoding": "br"})
    assert other.status_code == 400
    assert "Content-Encoding" in other.json()["detail"]


def memory_of(gateway: Gateway) -> int:
    return psutil.Process(gateway.pid).memory_info().rss


def inflight(wire: Wire, model: str, seq: int, number: int) -> str:
    body = {"model_id": model, "seq_id": seq, "sampling_session_seq_id": number, "kind": "inflight"}
    return wire.result(wire.post("/api/v1/save_weights_for_sampler", **body))["sampling_session_id"]


def test_inflight_samplers_follow_the_run(wire: Wire):
    session = wire.session()
    model = wire.model(session)

    def own(sampler: str, seq: int) -> list[float]:
        return list(array("f", asked(wire, sampler, seq, prompt_logprobs=True).prompt_logprobs))[1:]

    first = inflight(wire, model, 1, 0)
    before = own(first, 0)
    wire.loss(model, 2, 1)
    wire.result(wire.step(model, 3, 0.05))
    second = inflight(wire, model, 4, 1)
    assert second != first
    assert own(first, 1) == own(second, 0)
    assert own(first, 2) != before
    wire.post(f"/api/v1/sessions/{session}/finish", reason={"type": "success"})
    for sampler in (first, second):
        assert wire.sample(sampler, 9).status_code == 400


def test_weights_of_a_sampler_of_its_own_are_compared_with_the_trainers(wire: Wire, http: httpx.Client):
    def num_compared() -> int:
        lines = http.get("/metrics").text.splitlines()
        (count,) = [line.split()[1] for line in lines if line.startswith("selfloop_publish_logprob_gap_count")]
        return round(float(count))

    model = wire.model(wire.session())
    before = num_compared()
    inflight(wire, model, 1, 0)
    until(lambda: num_compared() > before, "the sampler's logprobs are compared")


def test_a_named_checkpoint_is_no_inflight_one(wire: Wire):
    model = wire.model(wire.session())
    body = {"model_id": model, "seq_id": 1, "path": "x", "kind": "inflight"}
    error = ok(wire.poll(wire.post("/api/v1/save_weights_for_sampler", **body)))
    assert error["category"] == "user"
    assert "kind" in error["error"]


def test_the_end_of_a_session_ends_its_samples(wire: Wire):
    session = wire.session()
    sampler = base_sampler(wire, session)
    future = ok(wire.sample(sampler, 0, **LONG))
    wire.post(f"/api/v1/sessions/{session}/finish", reason={"type": "interrupted"})
    assert wire.poll(future).status_code == 410
    assert wire.http.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 410
    # Samplers of checkpoints and base models outlive it.
    assert wire.poll(ok(wire.sample(sampler, 1))).status_code == 200


@contextmanager
def heartbeats(gateway: Gateway, session: str) -> Iterator[None]:
    """A session's client, which lives beside whatever else is done for as long as that takes."""
    over = threading.Event()

    def beat() -> None:
        with gateway.http() as http:
            while not over.wait(0.25):
                http.post("/api/v1/session_heartbeat", json={"session_id": session})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_silent_session_ends(new_gateway: Callable[[], Gateway]):
    gateway = new_gateway()
    gateway.terminate()
    gateway.start(KEY, "--session-timeout", "4")
    wire = Wire(gateway)
    session, other = wire.session(), wire.session()
    with heartbeats(gateway, other):
        with heartbeats(gateway, session):
            model = wire.model(session)
            body = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0}
            snapshot = wire.result(wire.post("/api/v1/save_weights_for_sampler", **body))["sampling_session_id"]
            body = {"model_id": model, "seq_id": 2, "path": "kept"}
            named = wire.result(wire.post("/api/v1/save_weights_for_sampler", **body))["path"]
        until(lambda: wire.sample(snapshot, 0).status_code == 400, "the snapshot goes with its session")
        assert wire.http.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 410
        assert wire.http.post("/api/v1/session_heartbeat", json={"session_id": other}).status_code == 200
        path = {"sampling_session_seq_id": 0, "model_path": named}
        refused = wire.http.post("/api/v1/create_sampling_session", json=path | {"session_id": session})
        assert refused.status_code == 400
        assert "cancelled" in refused.json()["detail"]
        # The named checkpoint stayed.
        wire.post("/api/v1/create_sampling_session", **path | {"session_id": other})


def test_samples_lost_with_a_gateway_are_reported(new_gateway: Callable[[], Gateway]):
    gateway = new_gateway()
    wire = Wire(gateway)
    sampler = base_sampler(wire, wire.session())
    done = ok(wire.sample(sampler, 0))
    assert wire.poll(done).status_code == 200
    cursor = ended(wire, sampler)["cursor"]
    ended(wire, sampler, cursor, timeout=0, retrieved_request_ids=[done["request_id"]])
    lost = ok(wire.sample(sampler, 1, **LONG))
    gateway.kill()
    gateway.start()
    answer = ended(wire, sampler, cursor)
    assert answer["completions"] == [{"state": "failed", "request_id": lost["request_id"]}]
    assert wire.poll(lost).status_code == 410
    assert ended(wire, sampler, answer["cursor"], timeout=0)["completions"] == []

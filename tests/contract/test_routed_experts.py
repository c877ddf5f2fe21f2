"""Router replay: a sample's experts are recorded, and training that names it sends its tokens to them again."""

import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from gateway import EXPERTS, KEY, MODEL, Gateway, Json, Run, copy_data, datum, ok, selfloop, words

PROMPT = words(3, 20)


@pytest.fixture(scope="module")
def http(experts_gateway: Gateway) -> httpx.Client:
    return experts_gateway.http()


@pytest.fixture
def start(experts_template: Path, tmp_path: Path) -> Iterator[Callable[[], Gateway]]:
    """Gateways of a test's own, over copies of one data directory."""
    started: list[Gateway] = []

    def begin() -> Gateway:
        started.append(Gateway(copy_data(experts_template, tmp_path / f"data-{len(started)}")))
        return started[-1].start(KEY)

    yield begin
    for own in started:
        own.close()


def new_run(http: httpx.Client, **fields: object) -> Run:
    return Run.create(http, base_model=EXPERTS, seed=5, **fields).attached()


def sample(run: Run, http: httpx.Client, **asked: object) -> list[Json]:
    """The choices; ``include_routed_experts`` unless said otherwise."""
    body = {"prompt": PROMPT, "n": 2, "max_tokens": 9, "logprobs": 0, "seed": 4, "include_routed_experts": True}
    answer = http.post(run.resource["sampler"]["base_url"] + "/sample", json=body | asked)
    return ok(answer)["choices"]


def whole(choice: Json) -> list[int]:
    return [*PROMPT, *choice["token_ids"]]


def referred(choice: Json, tokens: list[int] | None = None) -> Json:
    """A datum as a client of 0.32 makes it."""
    return datum(tokens or whole(choice)) | {"routed_experts_ref": choice["routed_experts_ref"]}


def span(kind: str, id: str, length: int, offset: int = 0) -> Json:
    return {"type": f"{kind}_tokens", "sequence_id": id, "offset": offset, "length": length}


def with_provenance(choice: Json) -> Json:
    """A datum as ``with_provenance`` makes it."""
    id, n = choice["sequence_id"], len(choice["token_ids"])
    return datum(whole(choice)) | {
        "model_input_spans": [span("prompt", id, len(PROMPT)), span("sampled", id, n - 1)],
        "loss_fn_input_spans": [span("prompt", id, len(PROMPT) - 1, 1), span("sampled", id, n)],
    }


def logprobs(run: Run, data: Json) -> list[float]:
    return run.forward([data])["loss_fn_outputs"][0]["logprobs"]["data"]


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def refused(response: httpx.Response, field: str, *says: str) -> None:
    assert response.status_code == 422, response.text
    assert response.json()["details"]["field"] == field, response.text
    for word in says:
        assert word in response.text, response.text


@pytest.mark.parametrize("queued", [False, True], ids=["direct", "queued"])
def test_a_sample_says_how_training_names_its_routes(http: httpx.Client, queued: bool):
    run = new_run(http)
    if queued:
        url = run.resource["sampler"]["base_url"]
        body = {"prompt": PROMPT, "n": 2, "max_tokens": 3, "include_routed_experts": True}
        accepted = ok(http.post(url + "/sample", json=body, headers={"Prefer": "respond-async"}), 202)
        choices = ok(http.get(f"{url}/operations/{accepted['operation_id']}"))["result"]["choices"]
    else:
        choices = sample(run, http)
    for choice in choices:
        uri = f"bt://loops:{run.id}/sequences/{choice['sequence_id']}"
        assert choice["routed_experts_ref"] == {"uri": uri, "version": 1}
    assert choices[0]["sequence_id"] != choices[1]["sequence_id"]
    assert run.forward([referred(choice) for choice in choices])["metrics"]["num_replayed_tokens"] == sum(
        len(whole(choice)) - 1 for choice in choices
    )
    # The newer client's word for a recording, which may go without routes.
    (plain,) = sample(run, http, n=1, include_routed_experts=False, record_stability_info=True)
    assert "sequence_id" in plain
    assert "routed_experts_ref" not in plain
    assert "num_replayed_tokens" not in run.forward([with_provenance(plain)])["metrics"]


def test_the_trainer_agrees_with_the_sampler(http: httpx.Client):
    run = new_run(http)
    run.train(1, 2)
    run.do("save_weights_for_sampler", name="now")
    for choice in sample(run, http):
        sampled = choice["logprobs"]["token_logprobs"]
        for data in (referred(choice), with_provenance(choice)):
            assert logprobs(run, data)[len(PROMPT) - 1 :] == pytest.approx(sampled, abs=1e-5)


@pytest.mark.parametrize("made", [referred, with_provenance], ids=["by reference", "by spans"])
def test_routes_of_other_weights_are_replayed(http: httpx.Client, made: Callable[[Json], Json]):
    """The weights have moved since, and their own routes with them."""
    run = new_run(http)
    (choice,) = sample(run, http, n=1)
    before = logprobs(run, datum(whole(choice)))
    assert difference(logprobs(run, made(choice)), before) < 1e-5
    for seed in range(6):
        run.forward_backward([datum(words(seed))])
        run.step(learning_rate=0.1)
    anew, again = logprobs(run, datum(whole(choice))), logprobs(run, made(choice))
    assert difference(anew, again) > 1e-3
    assert difference(again, before) > 1e-3
    # Only what a span names is replayed: the target's spans alone would not do, and the input's cover the prompt here.
    mixed = run.forward([datum(whole(choice)), made(choice)])["loss_fn_outputs"]
    for found, expected in zip(mixed, (anew, again), strict=True):
        assert difference(found["logprobs"]["data"], expected) < 1e-5


def test_every_loss_and_a_loss_of_the_clients_own_take_them(http: httpx.Client):
    run = new_run(http)
    (choice,) = sample(run, http, n=1)
    run.forward_backward([datum(words(1))])
    run.step(learning_rate=0.1)
    anew = logprobs(run, datum(whole(choice)))
    again = logprobs(run, referred(choice))
    n = len(whole(choice)) - 1
    sampled = [0.0] * (len(PROMPT) - 1) + choice["logprobs"]["token_logprobs"]
    advantages = [0.0] * (len(PROMPT) - 1) + [1.0] * len(choice["token_ids"])
    for loss in ("importance_sampling", "ppo", "cispo"):
        data = referred(choice) | {
            "loss_fn_inputs": datum(whole(choice), logprobs=sampled, advantages=advantages)["loss_fn_inputs"]
        }
        found = run.do("forward_backward", data=[data], loss_fn=loss)["loss_fn_outputs"][0]["logprobs"]["data"]
        assert difference(found, again) < 1e-5
    assert difference(anew, again) > 1e-3
    # A forward with weights of zero, then the backward with the slopes of the client's own loss.
    config = {"skip_token_normalization": True}
    run = new_run(http)
    (choice,) = sample(run, http, n=1)
    norms: list[float] = []
    for _ in range(2):
        run.do("init_trainer_server", lora_rank=8, base_model=EXPERTS)
        for op, weight in (("forward", 0.0), ("forward_backward", -0.5)):
            data = datum(whole(choice), weights=[weight] * n) | {"routed_experts_ref": choice["routed_experts_ref"]}
            run.do(op, data=[data], loss_fn="cross_entropy", loss_fn_config=config)
        norms.append(run.step()["metrics"]["grad_norm"])
    assert norms[0] == norms[1] > 0


def test_what_does_not_fit_the_record_is_refused(http: httpx.Client, experts_gateway: Gateway):
    run = new_run(http)
    choice, sibling = sample(run, http)
    ref, tokens, id = choice["routed_experts_ref"], whole(choice), choice["sequence_id"]
    changed = [*tokens]
    changed[7] = (changed[7] + 1) % 200
    plain = sample(run, http, n=1, include_routed_experts=False, record_stability_info=True)[0]
    unrecorded = f"bt://loops:{run.id}/sequences/{plain['sequence_id']}"
    field = "data[0].routed_experts_ref"
    for data, where, says in (
        (referred(choice, changed), field, f"{tokens[7]} at position 7, got {changed[7]}"),
        (referred(choice, [*tokens, 5, 6]), field, f"as long as model_input ({len(tokens) + 1} tokens)"),
        (datum(tokens) | {"routed_experts_ref": ref | {"version": 2}}, f"{field}.version", "1, got 2"),
        (datum(tokens) | {"routed_experts_ref": ref | {"uri": "s3://bucket/x"}}, f"{field}.uri", "bt://loops:"),
        (datum(tokens) | {"routed_experts_ref": ref | {"uri": ref["uri"] + "9"}}, f"{field}.uri", "was not"),
        (
            datum(tokens)
            | {"routed_experts_ref": ref | {"uri": re.sub("loops:[a-z0-9]+", "loops:aaaaaaa", ref["uri"])}},
            f"{field}.uri",
            "was not",
        ),
        (
            datum(tokens) | {"routed_experts_ref": ref | {"uri": "bt://loops:aaaaaaa/sequences/a/b/0"}},
            f"{field}.uri",
            "your team",
        ),
        (datum(tokens) | {"routed_experts_ref": ref | {"uri": unrecorded}}, f"{field}.uri", "include_routed_experts"),
        (with_provenance(choice) | {"routed_experts_ref": ref}, field, "null with model_input_spans"),
        (
            with_provenance(choice) | {"model_input_spans": [span("prompt", id, len(PROMPT))]},
            "data[0].model_input_spans",
            f"cover all {len(tokens) - 1} tokens, got {len(PROMPT)}",
        ),
        (
            with_provenance(choice)
            | {
                "model_input_spans": [
                    span("prompt", id, len(PROMPT)),
                    span("sampled", id, len(tokens) - len(PROMPT) - 1, 5),
                ]
            },
            "data[0].model_input_spans[1].length",
            "within the 9 sampled tokens",
        ),
    ):
        refused(run.post("forward_backward", data=[data], loss_fn="cross_entropy"), where, says)
    assert whole(sibling) != tokens
    made = selfloop("keys", "create", "other", "--team", "other-team", "--data-dir", str(experts_gateway.data_dir))
    theirs = new_run(experts_gateway.http(made.split()[-1]))
    refused(theirs.post("forward", data=[referred(choice)], loss_fn="cross_entropy"), f"{field}.uri", "your team")
    spans = theirs.post("forward", data=[with_provenance(choice)], loss_fn="cross_entropy")
    refused(spans, "data[0].model_input_spans[0].sequence_id", "your team")


def test_models_without_experts_refuse_by_name(http: httpx.Client):
    run = Run.create(http, base_model=MODEL).attached()
    body = {"prompt": PROMPT, "max_tokens": 2, "include_routed_experts": True}
    url = run.resource["sampler"]["base_url"]
    for headers in ({}, {"Prefer": "respond-async"}):
        refused(
            http.post(url + "/sample", json=body, headers=headers), "include_routed_experts", "no experts to route to"
        )
    other = new_run(http)
    (choice,) = sample(other, http, n=1)
    refused(
        run.post("forward", data=[referred(choice)], loss_fn="cross_entropy"),
        "data[0].routed_experts_ref",
        "no experts",
    )
    # By spans the sequence is words here, and its routes are of another model.
    refused(
        run.post("forward", data=[with_provenance(choice)], loss_fn="cross_entropy"),
        "data[0].model_input_spans[0].sequence_id",
        f"a sequence of {MODEL}",
    )


def recorded(gateway: Gateway) -> list[Path]:
    return sorted(gateway.data_dir.glob("recorded/*/*"))


def test_they_last_a_day_and_go_with_their_sampler(start: Callable[[], Gateway]):
    gateway = start()
    http = gateway.http()
    run = new_run(http)
    # More than a row is to hold.
    large = sample(run, http, n=200, max_tokens=24)[-1]
    small = sample(run, http, n=1)[0]
    assert len(recorded(gateway)) == 1
    gateway.terminate()
    stray = gateway.data_dir / "recorded" / run.resource["sampler"]["id"] / "left-behind.routes"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"x")
    gateway.start(None)
    assert not stray.exists()
    selfloop("doctor", "--verify", "--data-dir", str(gateway.data_dir))  # which exits with 1 for a damaged file
    assert logprobs(run, referred(large))
    assert logprobs(run, referred(small))
    with sqlite3.connect(next(gateway.data_dir.glob("*.db"))) as database:
        database.execute("UPDATE recorded_samples SET expires_at = expires_at - 24.1 * 3600")
    post = run.post("forward", data=[referred(small)], loss_fn="cross_entropy")
    refused(post, "data[0].routed_experts_ref.uri", "its day is over")
    # An ended run's sampler has no recordings, whoever asks.
    (choice,) = sample(run, http, n=1)
    other = new_run(http)
    assert logprobs(other, referred(choice))
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    refused(
        other.post("forward", data=[referred(choice)], loss_fn="cross_entropy"),
        "data[0].routed_experts_ref.uri",
        "on a live sampler",
    )


def test_what_was_accepted_is_replayed_with_the_routes_that_it_had(start: Callable[[], Gateway]):
    """Killed between acceptance and result, and the record gone: the numbers are those of an undisturbed server."""

    def results(*, disturbed: bool) -> list[list[float]]:
        gateway = start()
        http = gateway.http()
        run = new_run(http)
        (choice,) = sample(run, http, n=1)
        for seed in range(4):
            run.forward_backward([datum(words(seed))])
            run.step(learning_rate=0.1)
        ids = [run.submit("forward_backward", data=[referred(choice)], loss_fn="cross_entropy")]
        ids.append(run.submit("forward_backward", data=[with_provenance(choice)], loss_fn="cross_entropy"))
        ids.append(run.submit("optim_step", adam_params={"learning_rate": 0.05}))
        if disturbed:
            gateway.kill()
            with sqlite3.connect(next(gateway.data_dir.glob("*.db"))) as database:
                database.execute("DELETE FROM recorded_samples")
            gateway.start(None)
        outcomes = [run.result(id) for id in ids]
        assert outcomes[0]["metrics"]["num_replayed_tokens"] == len(whole(choice)) - 1
        if disturbed:
            gateway.kill_worker()
        found = [outcome["loss_fn_outputs"][0]["logprobs"]["data"] for outcome in outcomes[:2]]
        return [*found, run.logprobs(), [outcomes[2]["metrics"]["grad_norm"]]]

    assert results(disturbed=True) == results(disturbed=False)

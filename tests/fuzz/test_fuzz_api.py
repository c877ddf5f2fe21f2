"""Generated requests against a real gateway: no 5xx, and no answer outside the documented shapes.

``FUZZ_REQUESTS`` sets how many are sent in all (``make fuzz`` sends 25,000), and that they are others each time;
without it they are always the same.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gateway import KEY, Gateway, Run, copy_data, datum, ok, words


@schemathesis.serializer("application/x-protobuf")
def _binary(_context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else getattr(value, "data", str(value).encode())


ENDS_EVERYTHING = {"DELETE /api/v1/auth/apikey/me"}  # revokes the key of all further requests
NEVER_ENDS = {"GET /v1/loops/runs/{run_id}/metrics/stream"}  # as long as the run lives
REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "1200"))
ALWAYS_THE_SAME = "FUZZ_REQUESTS" not in os.environ
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def gateway(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of these tests' own: what they generate ends sessions, and makes thousands of things."""
    own = Gateway(copy_data(data_template, tmp_path_factory.mktemp("fuzzed") / "data")).start()
    yield own
    own.close()


@pytest.fixture(scope="module")
def ids(gateway: Gateway) -> dict[str, str]:
    """Real ids, so that generated requests get past the first look-up."""
    http = gateway.http()
    run = Run.create(http).attached()
    operation = run.submit("forward", data=[datum(words(1))], loss_fn="cross_entropy")
    run.result(operation)
    run.do("save_weights_for_sampler", name="fuzz")
    checkpoint = ok(http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"][0]
    sampler = run.resource["sampler"]
    (team, *_) = ok(http.get("/v1/teams"))["teams"]
    return {
        "run_id": run.id,
        "session_id": run.resource["session_id"],
        "sampler_id": sampler["id"],
        "model_id": sampler["model_id"],
        "deployment_id": run.resource["deployment_id"],
        "checkpoint_id": checkpoint["id"],
        "operation_id": operation,
        "team_id": team["id"],
        "path": checkpoint["path"],
        "base_model": run.resource["base_model"],
    }


@pytest.fixture(scope="module")
def operations(gateway: Gateway) -> list[Any]:
    document = ok(gateway.http().get("/openapi.json"))
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=gateway.url)
    found = [operation.ok() for operation in schema.get_all_operations()]
    return [operation for operation in found if operation.label not in ENDS_EVERYTHING | NEVER_ENDS]


def cases(operations: list[Any], ids: dict[str, str]) -> Iterator[tuple[str, st.SearchStrategy[Any]]]:
    for operation in operations:
        yield operation.label, operation.as_strategy().flatmap(lambda case: st.just(case) | _with_real_ids(case, ids))


def _with_real_ids(case: Any, ids: dict[str, str]) -> st.SearchStrategy[Any]:
    """The same case about things that exist, in its path and in its body."""

    def known(values: dict[str, Any]) -> dict[str, Any]:
        return {name: ids.get(name, value) for name, value in values.items()}

    case.path_parameters = known(case.path_parameters or {})
    if isinstance(case.body, dict):
        case.body = known(case.body)
    return st.just(case)


def test_generated_requests(gateway: Gateway, operations: list[Any], ids: dict[str, str]):
    """Every route of the OpenAPI document, from its own description."""
    headers = {"Authorization": f"Bearer {KEY}"}
    for label, strategy in cases(operations, ids):

        @settings(
            max_examples=max(3, REQUESTS // len(operations)),
            derandomize=ALWAYS_THE_SAME,
            print_blob=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def send(case: Any) -> None:
            response = case.call(headers=headers)
            case.validate_response(response, checks=CHECKS)

        try:
            send()
        except Exception as error:
            raise AssertionError(f"{label}\n{gateway.log[-2000:]}") from error
    assert gateway.http().get("/healthz").status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TENSOR = st.fixed_dictionaries(
    {
        "data": st.lists(st.integers(-200, 300) | st.none() | st.floats(allow_nan=False), max_size=6),
        "dtype": st.sampled_from(["int64", "float32", "bool", "x"]),
        "shape": st.lists(st.integers(-1, 7), max_size=2),
    }
)
DATUM = st.fixed_dictionaries(
    {
        "model_input": st.fixed_dictionaries(
            {
                "chunks": st.lists(
                    st.fixed_dictionaries(
                        {"type": st.just("encoded_text"), "tokens": st.lists(st.integers(-1, 300), max_size=6)}
                    )
                    | JSON,
                    max_size=2,
                )
            }
        ),
        "loss_fn_inputs": st.dictionaries(
            st.sampled_from(["target_tokens", "weights", "logprobs", "advantages", "mask"]), TENSOR | JSON, max_size=4
        ),
    }
)
LOSSES = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "dpo", "dppo", "no_such"]
TRAINING = st.fixed_dictionaries(
    {"data": st.lists(DATUM | JSON, max_size=3), "loss_fn": st.sampled_from(LOSSES)},
    optional={
        "loss_fn_config": st.dictionaries(st.sampled_from(["beta", "skip_token_normalization", "x"]), JSON, max_size=2),
        "top_k_logprobs": st.integers(-1, 30),
        "seq_id": st.integers(-2, 2**70),
        "run_id": st.text(max_size=4),
        "model": st.text(max_size=4),
    },
)
SAMPLING = st.fixed_dictionaries(
    {"prompt": st.lists(st.integers(-1, 270), max_size=8) | JSON, "max_tokens": st.integers(-1, 6) | JSON},
    optional={
        "n": st.integers(-1, 4) | JSON,
        "temperature": st.floats() | JSON,
        "top_p": st.floats(-1, 2) | JSON,
        "top_k": st.integers(-3, 2**40) | JSON,
        "seed": st.integers(-(2**65), 2**65) | JSON,
        "stop": st.text(max_size=3) | JSON,
        "stop_token_ids": st.lists(st.integers(-1, 2**33), max_size=3) | JSON,
        "logprobs": st.integers(-1, 2) | JSON,
        "prompt_logprobs": st.integers(-1, 30) | JSON,
        "structured_outputs": st.dictionaries(
            st.sampled_from(["json", "regex", "choice", "grammar"]), JSON, max_size=2
        ),
    },
)


@pytest.mark.parametrize(
    ("route", "bodies"), [("forward", TRAINING), ("forward_backward", TRAINING), ("sample", SAMPLING)]
)
def test_generated_bodies_of_the_data_plane(gateway: Gateway, ids: dict[str, str], route: str, bodies: Any):
    """Bodies that are nearly right: what is refused is refused by name, and nothing breaks."""
    http = gateway.http()
    kind, id = ("samplers", ids["sampler_id"]) if route == "sample" else ("runs", ids["run_id"])

    @settings(
        max_examples=REQUESTS // 6,
        derandomize=ALWAYS_THE_SAME,
        print_blob=True,
        database=None,
        phases=[Phase.generate],
    )
    @given(body=bodies)
    def send(body: dict[str, Any]) -> None:
        response = http.post(f"/loops/{kind}/{id}/{route}", content=_json(body))
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            details = response.json()["details"]
            assert details["reason"], response.text
            assert response.status_code != 422 or details["field"], response.text

    send()
    assert http.get("/healthz").status_code == 200


def _json(body: object) -> bytes:
    """Also what JSON does not have (NaN, infinity), as a careless client would send it."""
    return httpx.Request("POST", "http://x", content=json.dumps(body)).content

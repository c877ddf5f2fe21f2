"""The GraphQL dialect over the wire: what the command line asks, and how wrong questions are answered."""

import json
from typing import Any

import httpx
import pytest
from graphql import get_introspection_query

from gateway import MODEL, Run, ok

DEPLOY = """
mutation ($request: CreateModelVersionFromInferenceTemplateRequest!) {
  create_model_version_from_inference_template(request: $request) {
    model_version { id name model_id } truss_config
  }
}
"""


def ask(http: httpx.Client, query: str, **variables: Any) -> Any:
    return ok(http.post("/graphql/", json={"query": query, "variables": variables}))


def error(http: httpx.Client, query: str, **variables: Any) -> dict[str, Any]:
    answer = ask(http, query, **variables)
    assert answer["data"] is None
    return answer["errors"][0]


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    run = Run.create(http).attached()
    run.train(1)
    run.save("resume")
    run.save("one", "save_weights_for_sampler")
    return run


def id_of(run: Run, name: str) -> str:
    listed = ok(run.http.get("/v1/loops/checkpoints", params={"run_id": run.id}))["checkpoints"]
    return next(row["id"] for row in listed if row["checkpoint_id"] == name)


def request(*ids: str, **changed: Any) -> dict[str, Any]:
    sources = [
        {
            "weight_source_type": "B10_LOOPS_CHECKPOINTING",
            "b10_loops_checkpoint_weights_source": {"checkpoint": {"loops_checkpoint_id": id}},
        }
        for id in ids
    ]
    made = {
        "metadata": {"oracle_name": "served"},
        "weights_sources": sources,
        "inference_stack": {"stack_type": "VLLM", "environment_variables": []},
        "instance_type_id": "local",
        "dry_run": True,
    }
    return made | changed


def test_who_and_where(http: httpx.Client, other_team: httpx.Client):
    query = "{ teams { id name default } organization { id workspace_name } user { email } }"
    mine, theirs = ask(http, query)["data"], ask(other_team, query)["data"]
    assert [team["id"] for team in mine["teams"]] == [team["id"] for team in ok(http.get("/v1/teams"))["teams"]]
    assert mine["organization"]["workspace_name"] == "default"
    assert theirs["organization"] == {"id": mine["organization"]["id"], "workspace_name": "other"}
    assert mine["user"] != theirs["user"]
    (machine,) = ask(http, "{ listed_instances { id node_count memory_limit millicpu_limit } }")["data"][
        "listed_instances"
    ]
    assert (machine["id"], machine["node_count"]) == ("local", 1)
    assert machine["memory_limit"] > 2**28


def test_deploying_makes_a_standing_sampler(http: httpx.Client, run: Run):
    id = id_of(run, "one")
    hub = [{"name": "HF_TOKEN", "value": "hub", "is_secret_reference": True}]
    asked = request(id, dry_run=False, inference_stack={"stack_type": "VLLM", "environment_variables": hub})
    made = ask(http, DEPLOY, request=asked)["data"]["create_model_version_from_inference_template"]
    config = json.loads(made["truss_config"])
    assert config["model_metadata"]["checkpoints"][0]["path"] == f"bt://loops:{run.id}/sampler_weights/one"
    version = made["model_version"]
    samplers = ok(http.get("/v1/loops/samplers"))["samplers"]
    (sampler,) = [row for row in samplers if row["deployment_id"] == version["id"]]
    assert (sampler["base_model"], sampler["standing"]) == (MODEL, True)
    ok(http.post(f"/v1/loops/samplers/{sampler['id']}/deactivate", json={}))


def test_a_dry_run_checks_and_makes_nothing(http: httpx.Client, run: Run):
    before = len(ok(http.get("/v1/loops/samplers"))["samplers"])
    made = ask(http, DEPLOY, request=request(id_of(run, "one")))["data"]["create_model_version_from_inference_template"]
    assert made["model_version"] is None
    assert len(ok(http.get("/v1/loops/samplers"))["samplers"]) == before


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"instance_type_id": "h100x8"}, "instance_type_id"),
        ({"metadata": {"oracle_name": " "}}, "model_name"),
        ({"weights_sources": []}, "checkpoint_ids"),
        (
            {
                "weights_sources": [
                    {
                        "weight_source_type": "B10_CHECKPOINTING",
                        "b10_training_checkpoint_weights_source": {
                            "checkpoint": {"training_job_id": "j", "checkpoint_name": "c"}
                        },
                    }
                ]
            },
            "weights_sources[0]",
        ),
        ({"weights_sources": [{"weight_source_type": "B10_LOOPS_CHECKPOINTING"}]}, "weights_sources[0]"),
        (
            {
                "inference_stack": {
                    "stack_type": "VLLM",
                    "environment_variables": [{"name": "OTHER", "value": "1", "is_secret_reference": False}],
                }
            },
            "environment_variables[0]",
        ),
    ],
)
def test_what_cannot_be_deployed_is_refused_by_name(http: httpx.Client, run: Run, changed: dict[str, Any], field: str):
    refusal = error(http, DEPLOY, request=request(id_of(run, "one"), **changed))
    assert refusal["extensions"]["code"] == "BAD_REQUEST"
    assert field in refusal["message"]
    assert field in refusal["extensions"]["details"]["field"]


def test_others_and_trainers_checkpoints_are_not_deployed(http: httpx.Client, other_team: httpx.Client, run: Run):
    assert error(other_team, DEPLOY, request=request(id_of(run, "one")))["extensions"]["code"] == "NOT_FOUND"
    assert "sampler checkpoints" in error(http, DEPLOY, request=request(id_of(run, "resume")))["message"]


def test_without_a_key(gateway: Any):
    for http in (gateway.http(None), gateway.http("wrong")):
        answer = http.post("/graphql/", json={"query": "{ teams { id } }"})
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert answer.json()["errors"][0]["extensions"]["code"] == "DENIED"


def test_introspection(http: httpx.Client):
    schema = ask(http, get_introspection_query())["data"]["__schema"]
    assert schema["mutationType"]["name"] == "Mutation"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("{ teams { nonsense } }", "nonsense"),
        ("{ teams {", "Syntax Error"),
        ("", "Syntax Error"),
        ("{ a" + " { b" * 190 + " }" * 190 + " }", "Cannot query"),
        ("{ teams(x: " + "[" * 280 + "]" * 280 + ") { id } }", "too deeply"),
        ("{ " + "x: teams { id } " * 500 + "}", "tokens"),
        (DEPLOY, "request"),
    ],
)
def test_wrong_queries(http: httpx.Client, query: str, expected: str):
    answer = ask(http, query)
    assert answer["data"] is None
    assert expected in answer["errors"][0]["message"]


@pytest.mark.parametrize(
    "body", [{}, {"query": 1}, {"query": "{a}", "variables": []}, {"query": "{a}", "extensions": {}}]
)
def test_wrong_bodies(http: httpx.Client, body: dict[str, Any]):
    assert http.post("/graphql/", json=body).status_code == 422


def test_training_jobs_are_refused_with_what_to_do(http: httpx.Client):
    """Whichever route the command line asks first, in the order of its options."""
    (team,) = http.get("/v1/teams").json()["teams"]
    answers = [
        http.get("/v1/training_projects"),
        http.post("/v1/training_projects", json={"training_project": {"name": "p"}}),
        http.post(f"/v1/teams/{team['id']}/training_projects", json={}),
        http.get(f"/v1/teams/{team['id']}/secrets"),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert "Run the command where you are" in answer.json()["message"]
        assert answer.json()["details"]["field"] == "training_project"
    assert http.get("/v1/training_projects", headers={"Authorization": "Bearer wrong"}).status_code == 401

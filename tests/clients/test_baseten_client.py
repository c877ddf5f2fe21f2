"""The official ``baseten`` client's Loops methods, sync and async, each answer checked for what it says."""

import asyncio
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from baseten.client import AsyncManagementClient, ManagementClient
from baseten.client import managementapi as m
from baseten.client.managementapi._client import ResponseError

from gateway import KEY, MODEL, Gateway, Run, new_session, ok, selfloop, words

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
ELSEWHERE = HERE / "test_baseten_observations.py"
"""Logs, metrics and debug archives."""


class Awaited:
    """The async client, each of its methods awaited to its end."""

    def __init__(self, url: str, key: str) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._open(url, key))

    @staticmethod
    async def _open(url: str, key: str) -> AsyncManagementClient:
        return AsyncManagementClient(api_key=key, base_url_override=url)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda **arguments: self._runner.run(getattr(self._client.api, name)(**arguments))

    def close(self) -> None:
        self._runner.run(self._client.http_client.aclose())
        self._runner.close()


@pytest.fixture(scope="module", params=["sync", "async"])
def api(request: pytest.FixtureRequest, gateway: Gateway) -> Iterator[Any]:
    if request.param == "sync":
        with ManagementClient(api_key=KEY, base_url_override=gateway.url) as client:
            yield client.api
    else:
        awaited = Awaited(gateway.url, KEY)
        yield awaited
        awaited.close()


@pytest.fixture(scope="module")
def team_id(http: httpx.Client) -> str:
    return ok(http.get("/v1/teams"))["teams"][0]["id"]


@pytest.fixture(scope="module")
def trained(http: httpx.Client) -> Run:
    run = Run.create(http, seed=3, name="for the client").attached()
    run.train(1, 2)
    run.save("state")
    run.save("weights", "save_weights_for_sampler")
    return run


def refusal(call: Callable[[], Any]) -> ResponseError:
    with pytest.raises(ResponseError) as raised:
        call()
    return raised.value


# -- sessions, runs, trainers -------------------------------------------------------------------------


def test_sessions(api: Any, team_id: str):
    made = api.post_loops_sessions().session
    assert api.get_loops_sessions(session_id=made.id).session == made
    of_team = api.post_teams_loops_sessions(team_id=team_id).session
    assert api.get_loops_sessions(session_id=of_team.id).session == of_team
    assert refusal(lambda: api.get_loops_sessions(session_id="nothere")).status_code == 404


def test_run(api: Any):
    session = api.post_loops_sessions().session
    request = m.CreateLoopsRunRequest(
        session_id=session.id,
        base_model=MODEL,
        name="named",
        max_seq_len=64,
        lora_rank=4,
        seed=5,
        scale_down_delay_seconds=900,
    )
    run = api.post_loops_runs(request=request).run
    assert (run.session_id, run.base_model, run.name, run.status.name) == (session.id, MODEL, "named", "ACTIVE")
    assert (run.lora_config_version, run.user.email) == ("v1", "environment")
    assert run.sampler.base_model == MODEL
    assert run.sampler.instance_type.id == "local"
    assert api.get_loops_runs_run_id(run_id=run.id).run.id == run.id
    deployment = api.get_loops_deployments_deployment_id(deployment_id=run.deployment_id).deployment
    assert (deployment.active_run_id, deployment.latest_run_id, deployment.base_url) == (run.id, run.id, run.base_url)
    assert (deployment.sampler.id, deployment.user) == (run.sampler.id, run.user)
    ended = api.post_loops_runs_deactivate(run_id=run.id)
    assert (ended.id, ended.base_model, ended.user) == (run.id, MODEL, run.user)
    assert api.get_loops_runs_run_id(run_id=run.id).run.status.name == "INACTIVE"
    assert api.get_loops_samplers_sampler_id(sampler_id=run.sampler.id).sampler.status.name == "INACTIVE"


def test_runs_are_listed_newest_first(api: Any, team_id: str):
    session = api.post_teams_loops_sessions(team_id=team_id).session
    request = m.CreateLoopsRunRequest(session_id=session.id, base_model=MODEL, lora_rank=4)
    first = api.post_loops_runs(request=request).run
    second = api.post_teams_loops_runs(team_id=team_id, request=request).run
    mine = [run.id for run in api.get_loops_runs().runs]
    assert mine.index(second.id) < mine.index(first.id)
    assert [r.id for r in api.get_loops_runs(params=m.GetLoopsRunsParams(run_id=first.id)).runs] == [first.id]
    assert api.get_loops_runs(params=m.GetLoopsRunsParams(base_model="no/such")).runs == []
    of_team = api.get_teams_loops_runs(team_id=team_id, params=m.GetTeamsLoopsRunsParams(scope="org")).runs
    assert {first.id, second.id} <= {run.id for run in of_team}
    assert refusal(lambda: api.get_teams_loops_runs(team_id="nothere")).status_code == 404


def test_trainer_and_its_sampler(api: Any, team_id: str):
    session = api.post_loops_sessions().session
    request = m.CreateLoopsTrainerRequest(session_id=session.id, base_model=MODEL, lora_rank=4)
    first = api.post_loops_trainers(request=request).run
    assert first.sampler is None
    again = m.CreateLoopsTrainerRequest(
        session_id=session.id, base_model=MODEL, lora_rank=4, reuse_from_run_id=first.id
    )
    second = api.post_teams_loops_trainers(team_id=team_id, request=again).run
    assert second.deployment_id == first.deployment_id
    paired = m.CreateLoopsSamplerRequest(session_id=session.id, run_id=first.id, availability_model="dedicated")
    sampler = api.post_loops_samplers(request=paired).sampler
    assert api.get_loops_runs_run_id(run_id=first.id).run.sampler.id == sampler.id
    ended = api.post_loops_deployments_deactivate(deployment_id=first.deployment_id)
    assert (ended.id, ended.base_model, ended.user) == (first.deployment_id, MODEL, first.user)
    assert api.get_loops_runs_run_id(run_id=second.id).run.status.name == "INACTIVE"
    found = api.get_loops_deployments_deployment_id(deployment_id=first.deployment_id).deployment
    assert (found.status.name, found.active_run_id, found.latest_run_id) == ("STOPPED", None, second.id)


def test_deployments_are_listed(api: Any, trained: Run):
    listed = api.get_loops_deployments(params=m.GetLoopsDeploymentsParams(scope="org")).deployments
    (own,) = [d for d in listed if d.id == trained.resource["deployment_id"]]
    assert (own.status.name, own.availability_model, own.node_count) == ("RUNNING", "dedicated", 1)
    assert own.instance_type == api.get_instance_types().instance_types[0]
    assert [d.created_at for d in listed] == sorted((d.created_at for d in listed), reverse=True)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("availability_model", "spot", "SPOT_UNAVAILABLE"),
        ("replicas", 2, "REPLICAS_UNAVAILABLE"),
        ("sampler_num_replicas", 2, "REPLICAS_UNAVAILABLE"),
    ],
)
def test_what_one_machine_cannot_give_is_refused(api: Any, field: str, value: object, reason: str):
    session = api.post_loops_sessions().session
    request = m.CreateLoopsRunRequest(session_id=session.id, base_model=MODEL, **{field: value})
    error = refusal(lambda: api.post_loops_runs(request=request))
    assert error.status_code == 422
    assert f'"reason":"{reason}"' in error.body
    assert f'"field":"{field}"' in error.body


# -- samplers -----------------------------------------------------------------------------------------


def test_standalone_sampler(api: Any, team_id: str, trained: Run):
    session = api.post_loops_sessions().session
    base = m.CreateLoopsSamplerRequest(session_id=session.id, base_model=MODEL, max_seq_length=32)
    pinned = m.CreateLoopsSamplerRequest(
        session_id=session.id, model_path=f"bt://loops:{trained.id}/sampler_weights/weights"
    )
    first = api.post_loops_samplers(request=base).sampler
    second = api.post_teams_loops_samplers(team_id=team_id, request=pinned).sampler
    for listed in (
        api.get_loops_samplers().samplers,
        api.get_loops_samplers(params=m.GetLoopsSamplersParams(scope="org")).samplers,
        api.get_teams_loops_samplers(team_id=team_id).samplers,
    ):
        ids = [sampler.id for sampler in listed]
        assert ids.index(second.id) < ids.index(first.id)
    readiness = api.get_models_deployments_deployment_id(model_id=first.model_id, deployment_id=first.deployment_id)
    assert (readiness.status, readiness.model_id, readiness.active_replica_count) == ("ACTIVE", first.model_id, 1)
    assert api.get_loops_samplers_sampler_id(sampler_id=first.id).sampler.status.name == "ACTIVE"
    ended = api.post_loops_samplers_deactivate(sampler_id=first.id)
    assert (ended.id, ended.base_model, ended.user.email) == (first.id, MODEL, "environment")
    assert api.get_loops_samplers_sampler_id(sampler_id=first.id).sampler.status.name == "INACTIVE"
    model_version = {"model_id": second.model_id, "deployment_id": second.deployment_id}
    assert api.post_models_deployments_deactivate(**model_version).no_op is False
    assert api.post_models_deployments_deactivate(**model_version).no_op is True


# -- checkpoints --------------------------------------------------------------------------------------


def test_checkpoints(api: Any, trained: Run):
    listed = api.get_loops_checkpoints(params=m.GetLoopsCheckpointsParams(run_id=trained.id)).checkpoints
    assert [(c.checkpoint_id, c.target) for c in listed] == [("weights", "sampler"), ("state", "trainer")]
    for checkpoint in listed:
        assert (checkpoint.run_id, checkpoint.base_model, checkpoint.sync_status) == (trained.id, MODEL, "COMPLETE")
        assert checkpoint.lora_adapter_config == {"r": 8, "lora_alpha": 32.0}
        assert checkpoint.lora_config.config_version == "v1"
        assert checkpoint.lora_config.targets[0] == "q_proj"
        assert len(checkpoint.lora_config.targets) == 7
    by_model = api.get_loops_checkpoints(params=m.GetLoopsCheckpointsParams(base_model=MODEL)).checkpoints
    assert {c.id for c in listed} <= {c.id for c in by_model}
    path = f"bt://loops:{trained.id}/sampler_weights/weights"
    (found,) = api.get_loops_checkpoints(params=m.GetLoopsCheckpointsParams(checkpoint_path=path)).checkpoints
    assert found == listed[0]
    assert api.get_loops_checkpoints_source(checkpoint_id=found.id).source.kind == "s3"


def test_checkpoint_files_in_pages(api: Any, trained: Run):
    path = f"bt://loops:{trained.id}/weights/state"
    (found,) = api.get_loops_checkpoints(params=m.GetLoopsCheckpointsParams(checkpoint_path=path)).checkpoints
    names: list[str] = []
    size = 0
    token: int | None = 0
    while token is not None:
        params = m.GetLoopsCheckpointsFilesParams(page_size=2, page_token=token)
        page = api.get_loops_checkpoints_files(checkpoint_id=found.id, params=params)
        assert len(page.presigned_urls) <= 2
        for file in page.presigned_urls:
            content = httpx.get(file.url).raise_for_status().content
            assert len(content) == file.size_bytes
            size += len(content)
            names.append(file.relative_file_name)
        token = page.next_page_token
    assert len(names) == page.total_count
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"} <= set(names)
    assert size == found.size_bytes


def test_checkpoint_is_validated(api: Any, trained: Run):
    path = f"bt://loops:{trained.id}/sampler_weights/weights"
    api.post_loops_checkpoints_validate(request=m.ValidateLoopsCheckpointRequest(checkpoint_path=path))
    api.post_loops_checkpoints_validate(
        request=m.ValidateLoopsCheckpointRequest(checkpoint_path=path, run_id=trained.id)
    )
    for wrong, status in ((path + "-not", 404), ("bt://elsewhere", 422)):
        request = m.ValidateLoopsCheckpointRequest(checkpoint_path=wrong)
        assert refusal(lambda r=request: api.post_loops_checkpoints_validate(request=r)).status_code == status


def test_deployed_checkpoints(api: Any, http: httpx.Client, trained: Run):
    params = m.GetLoopsCheckpointsParams(checkpoint_path=f"bt://loops:{trained.id}/sampler_weights/weights")
    (weights,) = api.get_loops_checkpoints(params=params).checkpoints
    name = f"captain-{type(api).__name__}"
    request = m.DeployLoopsCheckpointRequest(
        checkpoint_ids=[weights.id],
        model_name=name,
        instance_type_id=api.get_instance_types().instance_types[0].id,
        hf_secret_name="hf_access_token",
    )
    made = api.post_loops_checkpoints_deploy(request=request)
    deployment = api.get_models_deployments_deployment_id(model_id=made.model_id, deployment_id=made.deployment_id)
    assert (deployment.status, deployment.is_production, deployment.environment) == ("ACTIVE", True, "production")
    assert deployment.autoscaling_settings.min_replica == 1
    assert deployment.labels == {"hf_secret_name": "hf_access_token"}
    (model,) = api.get_models(params=m.GetModelsParams(name=name)).models
    assert (model.id, model.deployments_count, model.team_name) == (made.model_id, 1, "default")
    assert api.get_models_model_id(model_id=made.model_id) == model
    assert [d.id for d in api.get_models_deployments(model_id=made.model_id).deployments] == [made.deployment_id]
    (sampler,) = [s for s in api.get_loops_samplers().samplers if s.model_id == made.model_id]
    sampled = http.post(
        f"/loops/samplers/{sampler.id}/sample", json={"prompt": words(1), "max_tokens": 2, "model": "weights"}
    )
    assert sampled.headers["x-trainers-policy-version"] == "2"
    assert len(ok(sampled)["choices"][0]["token_ids"]) >= 1
    assert api.post_models_deployments_deactivate(model_id=made.model_id, deployment_id=made.deployment_id).success


# -- what the caller may use --------------------------------------------------------------------------


def test_capabilities(api: Any):
    def supported(**params: Any) -> list[Any]:
        return api.get_loops_capabilities(params=m.GetLoopsCapabilitiesParams(**params)).supported_models

    (model,) = supported(model=MODEL, use_case="sft")
    assert (model.max_seq_len, model.max_enabled_seq_len, model.enabled) == (256, 256, True)
    assert model.enablement_details is None
    assert supported(model="no/such") == []
    (too_long,) = supported(model=MODEL, max_seq_len=m.MaxSeqLen(1000))
    assert too_long.enabled is False
    assert too_long.enablement_details.reason == "sequence_length_unsupported"
    assert MODEL in [s.model_name for s in api.get_loops_capabilities().supported_models]


def test_user_config(gateway: Gateway, api: Any):
    made = selfloop("keys", "create", f"config-{type(api).__name__}", "--data-dir", str(gateway.data_dir))
    key = made.split()[-1]
    own = Awaited(gateway.url, key)
    try:
        cleared = m.LoopsUserConfig(trainer_accelerator_priority=None, sampler_accelerator_priority=None)
        assert own.get_loops_user_config().user_config == cleared
        elsewhere = m.PatchLoopsUserConfigRequest(trainer_accelerator_priority=["H100", "H200"])
        assert own.patch_loops_user_config(request=elsewhere).user_config.trainer_accelerator_priority == [
            "H100",
            "H200",
        ]
        both = own.patch_loops_user_config(
            request=m.PatchLoopsUserConfigRequest(sampler_accelerator_priority=["H100"])
        ).user_config
        assert both.trainer_accelerator_priority == ["H100", "H200"], "what is left out is left alone"
        session = own.post_loops_sessions().session
        request = m.CreateLoopsRunRequest(session_id=session.id, base_model=MODEL)
        error = refusal(lambda: own.post_loops_runs(request=request))
        assert error.status_code == 409
        assert "ACCELERATOR_NOT_ALLOWED" in error.body
        (model,) = own.get_loops_capabilities(params=m.GetLoopsCapabilitiesParams(model=MODEL)).supported_models
        assert (model.enabled, model.max_enabled_seq_len) == (False, 0)
        assert model.enablement_details.reason == "accelerator_not_allowed"
        empty = m.PatchLoopsUserConfigRequest(trainer_accelerator_priority=[])
        assert refusal(lambda: own.patch_loops_user_config(request=empty)).status_code == 422
        null = m.PatchLoopsUserConfigRequest(trainer_accelerator_priority=None, sampler_accelerator_priority=None)
        assert own.patch_loops_user_config(request=null).user_config == cleared
        assert own.post_loops_runs(request=request).run.status.name == "ACTIVE"
    finally:
        own.close()
    untouched = api.get_loops_user_config().user_config
    assert untouched == cleared, "each key has its own"
    assert api.patch_loops_user_config(request=m.PatchLoopsUserConfigRequest()).user_config == untouched


def test_teams_users_and_machines(api: Any, team_id: str):
    (team,) = api.get_teams().teams
    assert (team.id, team.name, team.default) == (team_id, "default", True)
    assert api.get_teams(params=m.GetTeamsParams(name="another")).teams == []
    me = api.get_users_me()
    assert (me.name, me.workspace_name) == ("environment", "default")
    (machine,) = api.get_instance_types().instance_types
    assert machine.millicpu_limit >= 1000
    (price,) = api.get_instance_type_prices().instance_types
    assert (price.instance_type, price.price) == (machine, 0.0)


# -- nothing is left out ------------------------------------------------------------------------------


def loops_methods(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if re.search(r"_loops_", name)}


@pytest.mark.parametrize("kind", [m.ApiClient, m.AsyncApiClient])
def test_every_loops_method_has_a_test(kind: type):
    text = "".join(path.read_text(encoding="utf-8") for path in (Path(__file__), ELSEWHERE) if path.exists())
    called = set(re.findall(r"\.(\w+_loops_\w+)\(", text))
    methods = loops_methods(kind)
    assert len(methods) == 31
    assert methods - called == set()


def test_a_new_session_is_the_same_as_over_http(api: Any, http: httpx.Client):
    assert api.get_loops_sessions(session_id=new_session(http)).session.id

"""Sessions and the runs made in them."""

from typing import Annotated

from fastapi import APIRouter, Body, Response

from selfloop.control.resources.listings import Cut, Part
from selfloop.control.resources.runs import RunRequest, RunView
from selfloop.server.management.render import MemberOf, RenderOf, Scope, refuse_unserved
from selfloop.server.management.schemas.common import DeactivateLoopsRunResponseV1
from selfloop.server.management.schemas.runs import (
    CreateLoopsRunRequestV1,
    CreateLoopsRunResponseV1,
    CreateLoopsSessionRequestV1,
    CreateLoopsSessionResponseV1,
    CreateLoopsTrainerRequestV1,
    CreateLoopsTrainerResponseV1,
    GetLoopsRunResponseV1,
    GetLoopsSessionResponseV1,
    ListLoopsRunsResponseV1,
    LoopsSessionV1,
)
from selfloop.server.management.schemas.samplers import NewestSamplerResponseV1, NewestWeightsV1
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.lists import PagingOf, listed
from selfloop.server.shared.schemas import code_samples

router = APIRouter()

_CREATE_RUN = code_samples(
    bash="""\
read_id='import json, sys; print(json.load(sys.stdin)["session"]["id"])'
session=$(curl --request POST "$LOOPS_BASE_URL/v1/loops/sessions" \\
  --header "Authorization: Bearer $BASETEN_API_KEY" | python3 -c "$read_id")
curl "$LOOPS_BASE_URL/v1/loops/runs" \\
  --header "Authorization: Bearer $BASETEN_API_KEY" --header "Content-Type: application/json" \\
  --data '{"session_id": "'"$session"'", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "lora_rank": 16}'
""",
    python="""\
import os

import httpx


key = {"Authorization": f"Bearer {os.environ['BASETEN_API_KEY']}"}
with httpx.Client(base_url=os.environ["LOOPS_BASE_URL"], headers=key) as server:
    session = server.post("/v1/loops/sessions").raise_for_status().json()["session"]
    asked = {"session_id": session["id"], "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "lora_rank": 16}
    run = server.post("/v1/loops/runs", json=asked).raise_for_status().json()["run"]
print(run["base_url"], run["sampler"]["base_url"])
""",
)


@router.post("/loops/sessions", summary="Create a Loops session.")
@router.post("/teams/{team_id}/loops/sessions", summary="Create a Loops session in a team.")
async def create_session(
    caller: MemberOf,
    control: ControlOf,
    body: Annotated[CreateLoopsSessionRequestV1 | None, Body()] = None,
) -> CreateLoopsSessionResponseV1:
    row = await control.runs.create_session(caller, body.training_project_id if body else None)
    return CreateLoopsSessionResponseV1(session=LoopsSessionV1(id=row.id))


@router.get("/loops/sessions/{session_id}", summary="Get a Loops session.")
async def get_session(session_id: str, caller: CallerOf, control: ControlOf) -> GetLoopsSessionResponseV1:
    row = await control.runs.session(caller, session_id)
    return GetLoopsSessionResponseV1(session=LoopsSessionV1(id=row.id))


def _run_request(body: CreateLoopsRunRequestV1) -> RunRequest:
    refuse_unserved(body)
    return RunRequest(
        session_id=body.session_id,
        base_model=body.base_model,
        # Unset is not the same as 64: a checkpoint at `path` brings its own rank.
        lora_rank=body.lora_rank if "lora_rank" in body.model_fields_set else None,
        default_lora_rank=body.lora_rank,
        max_seq_len=body.max_seq_len,
        seed=body.seed,
        scale_down_delay_s=body.scale_down_delay_seconds,
        path=body.path,
        reuse_from_session_id=body.reuse_from_session_id,
        reuse_from_run_id=body.reuse_from_run_id,
        name=body.name,
        keep_last_checkpoints=body.keep_last_checkpoints,
        scope=body.scope,
        base_checkpoint=body.base_checkpoint,
    )


@router.post("/loops/runs", summary="Make a run with its sampler.", openapi_extra=_CREATE_RUN)
@router.post("/teams/{team_id}/loops/runs", summary="Make a run with its sampler in a team.")
async def create_run(
    body: CreateLoopsRunRequestV1, caller: MemberOf, control: ControlOf, render: RenderOf
) -> CreateLoopsRunResponseV1:
    """A LoRA adapter to train, its queue of operations, and a sampler that serves what it publishes.

    The base model begins to load at once; operations may be posted meanwhile.
    """
    view = await control.runs.create(caller, _run_request(body), with_sampler=True)
    return CreateLoopsRunResponseV1(run=render.run(view))


@router.post("/loops/trainers", summary="Create a Loops run without a sampler.")
@router.post("/teams/{team_id}/loops/trainers", summary="Create a Loops run without a sampler in a team.")
@router.post("/loops/debug/trainers", summary="The same: where the client posts a run that has a scope.")
@router.post("/teams/{team_id}/loops/debug/trainers", summary="The same in a team.")
async def create_trainer(
    body: CreateLoopsTrainerRequestV1, caller: MemberOf, control: ControlOf, render: RenderOf
) -> CreateLoopsTrainerResponseV1:
    view = await control.runs.create(caller, _run_request(body), with_sampler=False)
    return CreateLoopsTrainerResponseV1(run=render.trainer(view))


@router.get("/loops/runs", summary="List Loops runs.", response_model=ListLoopsRunsResponseV1)
@router.get("/teams/{team_id}/loops/runs", summary="List a team's Loops runs.", response_model=ListLoopsRunsResponseV1)
async def list_runs(
    caller: MemberOf,
    control: ControlOf,
    render: RenderOf,
    paging: PagingOf,
    run_id: str | None = None,
    base_model: str | None = None,
    scope: Scope = None,
) -> Response:
    """Newest first."""

    async def fetch(cut: Cut) -> Part[RunView]:
        return await control.runs.list(caller, cut, run_id=run_id, base_model=base_model, whole_team=scope == "org")

    return await listed(paging, "runs", (caller.key_id, run_id, base_model, scope), fetch, render.trainer)


@router.get("/loops/runs/{run_id}", summary="Get a Loops run.")
async def get_run(run_id: str, caller: CallerOf, control: ControlOf, render: RenderOf) -> GetLoopsRunResponseV1:
    return GetLoopsRunResponseV1(run=render.trainer(await control.runs.get(caller, run_id)))


@router.post("/loops/runs/{run_id}/deactivate", summary="Deactivate a Loops run; its checkpoints stay.")
async def deactivate_run(
    run_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> DeactivateLoopsRunResponseV1:
    row = (await control.runs.deactivate(caller, run_id)).run
    return DeactivateLoopsRunResponseV1(id=row.id, base_model=row.base_model, user=render.user(row.key_id))


@router.post("/loops/runs/{run_id}/newest_sampler", summary="Make a sampler of a run's newest weights.")
async def newest_sampler(
    run_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> NewestSamplerResponseV1:
    """A standalone one: of what a live run has by now (nothing is published), or of an ended run's last checkpoint.

    Deactivate it after use.
    """
    made = await control.newest_weights.sampler(caller, run_id)
    weights = NewestWeightsV1(run_id=run_id, step=made.step, path=made.path)
    return NewestSamplerResponseV1(sampler=render.sampler(made.sampler), weights=weights)

"""Routes below ``/v1``. A team's twin of a route answers as the plain one, for that team."""

from typing import Annotated, Literal

from fastapi import APIRouter, Body, Depends, Query
from fastapi.responses import FileResponse

from selfloop.control.resources.access import Caller
from selfloop.control.resources.runs import RunRequest, RunView
from selfloop.control.resources.samplers import exactly_one
from selfloop.server.auth import CallerOf, ControlOf
from selfloop.server.management import schemas as s
from selfloop.server.management.render import Renderer, refuse_unserved
from selfloop.types.errors import BadRequest, NotFound

router = APIRouter(prefix="/v1", tags=["management"])

# The clients ask again only after 10 s, so a status that is about to change is worth waiting for.
_READINESS_HOLD_S = 25.0

RenderOf = Annotated[Renderer, Depends(Renderer)]
Scope = Annotated[Literal["org"] | None, Query(description="`org` lists the whole team's, not only your own.")]


async def _member(caller: CallerOf, team_id: str | None = None) -> Caller:
    """The caller, checked to belong to the team that the path names (if it names one)."""
    if team_id is not None and team_id != caller.team_id:
        raise NotFound("team", team_id)
    return caller


MemberOf = Annotated[Caller, Depends(_member)]


# -- sessions -----------------------------------------------------------------------------------------


@router.post("/loops/sessions", summary="Create a Loops session.")
@router.post("/teams/{team_id}/loops/sessions", summary="Create a Loops session in a team.")
async def create_session(
    caller: MemberOf,
    control: ControlOf,
    body: Annotated[s.CreateLoopsSessionRequestV1 | None, Body()] = None,
) -> s.LoopsSessionResponseV1:
    row = await control.runs.create_session(caller, body.training_project_id if body else None)
    return s.LoopsSessionResponseV1(session=s.LoopsSessionV1(id=row.id))


@router.get("/loops/sessions/{session_id}", summary="Get a Loops session.")
async def get_session(session_id: str, caller: CallerOf, control: ControlOf) -> s.LoopsSessionResponseV1:
    row = await control.runs.session(caller, session_id)
    return s.LoopsSessionResponseV1(session=s.LoopsSessionV1(id=row.id))


# -- runs ---------------------------------------------------------------------------------------------


def _run_request(body: s.CreateLoopsRunRequestV1) -> RunRequest:
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
    )


@router.post("/loops/runs", summary="Create a Loops run.")
@router.post("/teams/{team_id}/loops/runs", summary="Create a Loops run in a team.")
async def create_run(
    body: s.CreateLoopsRunRequestV1, caller: MemberOf, control: ControlOf, render: RenderOf
) -> s.CreateLoopsRunResponseV1:
    """Creates a Loops run with an associated sampler in the given session."""
    view = await control.runs.create(caller, _run_request(body), with_sampler=True)
    return s.CreateLoopsRunResponseV1(run=render.run(view))


@router.post("/loops/trainers", summary="Create a Loops run without a sampler.")
@router.post("/teams/{team_id}/loops/trainers", summary="Create a Loops run without a sampler in a team.")
async def create_trainer(
    body: s.CreateLoopsRunRequestV1, caller: MemberOf, control: ControlOf, render: RenderOf
) -> s.LoopsTrainerResponseV1:
    view = await control.runs.create(caller, _run_request(body), with_sampler=False)
    return s.LoopsTrainerResponseV1(run=render.trainer(view))


@router.get("/loops/runs", summary="List Loops runs.")
@router.get("/teams/{team_id}/loops/runs", summary="List a team's Loops runs.")
async def list_runs(
    caller: MemberOf,
    control: ControlOf,
    render: RenderOf,
    run_id: str | None = None,
    base_model: str | None = None,
    scope: Scope = None,
) -> s.ListLoopsRunsResponseV1:
    views = await control.runs.list(caller, run_id=run_id, base_model=base_model, whole_team=scope == "org")
    return s.ListLoopsRunsResponseV1(runs=[render.trainer(view) for view in views])


@router.get("/loops/runs/{run_id}", summary="Get a Loops run.")
async def get_run(run_id: str, caller: CallerOf, control: ControlOf, render: RenderOf) -> s.LoopsTrainerResponseV1:
    return s.LoopsTrainerResponseV1(run=render.trainer(await control.runs.get(caller, run_id)))


@router.post("/loops/runs/{run_id}/deactivate", summary="Deactivate a Loops run; its checkpoints stay.")
async def deactivate_run(run_id: str, caller: CallerOf, control: ControlOf) -> s.DeactivateLoopsRunResponseV1:
    view = await control.runs.deactivate(caller, run_id)
    return s.DeactivateLoopsRunResponseV1(id=view.run.id, base_model=view.run.base_model)


# -- samplers -----------------------------------------------------------------------------------------


@router.post("/loops/samplers", summary="Create a Loops sampler.")
@router.post("/teams/{team_id}/loops/samplers", summary="Create a Loops sampler in a team.")
async def create_sampler(
    body: s.CreateLoopsSamplerRequestV1, caller: MemberOf, control: ControlOf, render: RenderOf
) -> s.LoopsSamplerResponseV1:
    """A sampler paired with a run (one a run), or a standalone one of a base model or a checkpoint."""
    if body.availability_model != "dedicated":
        raise BadRequest("availability_model", "dedicated: this server has no spot capacity")
    if body.num_replicas not in (None, 1):
        raise BadRequest("num_replicas", f"1, got {body.num_replicas}")
    exactly_one(run_id=body.run_id, base_model=body.base_model, model_path=body.model_path)
    if body.run_id is not None:
        for field in ("max_seq_length", "reuse_from_session_id"):
            if getattr(body, field) is not None:
                raise BadRequest(field, "null with run_id: a paired sampler serves as its run does")
        row = await control.samplers.create_paired(caller, body.session_id, body.run_id)
    else:
        row = await control.samplers.create_standalone(
            caller,
            body.session_id,
            base_model=body.base_model,
            model_path=body.model_path,
            max_seq_len=body.max_seq_length,
            reuse_from_session_id=body.reuse_from_session_id,
        )
    return s.LoopsSamplerResponseV1(sampler=render.sampler(row))


@router.get("/loops/samplers", summary="List Loops samplers.")
async def list_samplers(
    caller: CallerOf, control: ControlOf, render: RenderOf, scope: Scope = None
) -> s.ListLoopsSamplersResponseV1:
    rows = await control.samplers.list(caller, whole_team=scope == "org")
    return s.ListLoopsSamplersResponseV1(samplers=[render.sampler(row) for row in rows])


@router.get("/loops/samplers/{sampler_id}", summary="Get a Loops sampler.")
async def get_sampler(
    sampler_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> s.LoopsSamplerResponseV1:
    return s.LoopsSamplerResponseV1(sampler=render.sampler(await control.samplers.get(caller, sampler_id)))


@router.post("/loops/samplers/{sampler_id}/deactivate", summary="Deactivate a Loops sampler.")
async def deactivate_sampler(
    sampler_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> s.LoopsSamplerResponseV1:
    row = await control.samplers.deactivate(caller, sampler_id)
    return s.LoopsSamplerResponseV1(sampler=render.sampler(row))


@router.get("/models/{model_id}/deployments/{deployment_id}", summary="Readiness of a sampler.")
async def readiness(model_id: str, deployment_id: str, caller: CallerOf, control: ControlOf) -> s.DeploymentReadinessV1:
    """The sampler's status; one that is coming up is waited for, up to 25 s."""
    row = await control.samplers.by_deployment(caller, model_id, deployment_id)
    await control.lifecycle.settled(row.id, _READINESS_HOLD_S)
    status = control.lifecycle.status(row.id) or row.status
    return s.DeploymentReadinessV1(
        id=deployment_id, status=s.DeploymentStatusV1(status), reason=control.lifecycle.describe(row.id)
    )


# -- deployments --------------------------------------------------------------------------------------


@router.get("/loops/deployments", summary="List trainer deployments.")
async def list_deployments(
    caller: CallerOf, control: ControlOf, render: RenderOf, scope: Scope = None
) -> s.ListLoopsDeploymentsResponseV1:
    rows = await control.runs.deployments(caller, whole_team=scope == "org")
    views = await control.runs.list(caller, run_id=None, base_model=None, whole_team=True)
    by_deployment: dict[str, list[RunView]] = {}
    for view in views:
        by_deployment.setdefault(view.run.deployment_id, []).append(view)
    return s.ListLoopsDeploymentsResponseV1(
        deployments=[render.deployment(row, by_deployment.get(row.id, [])) for row in rows]
    )


@router.get("/loops/deployments/{deployment_id}", summary="Get a trainer deployment.")
async def get_deployment(
    deployment_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> s.LoopsDeploymentResponseV1:
    row, views = await control.runs.deployment(caller, deployment_id)
    return s.LoopsDeploymentResponseV1(deployment=render.deployment(row, list(views)))


@router.post("/loops/deployments/{deployment_id}/deactivate", summary="Deactivate a deployment and its runs.")
async def deactivate_deployment(
    deployment_id: str, caller: CallerOf, control: ControlOf, render: RenderOf
) -> s.LoopsDeploymentResponseV1:
    await control.runs.deactivate_deployment(caller, deployment_id)
    return await get_deployment(deployment_id, caller, control, render)


# -- checkpoints --------------------------------------------------------------------------------------


@router.get("/loops/checkpoints", summary="List checkpoints of a run, of a base model, or at a path.")
async def list_checkpoints(
    caller: CallerOf,
    control: ControlOf,
    render: RenderOf,
    run_id: str | None = None,
    base_model: str | None = None,
    checkpoint_path: str | None = None,
) -> s.ListLoopsCheckpointsResponseV1:
    exactly_one(run_id=run_id, base_model=base_model, checkpoint_path=checkpoint_path)
    if run_id is not None:
        rows = await control.checkpoints.of_run(caller, run_id)
    elif base_model is not None:
        rows = await control.checkpoints.of_model(caller, base_model)
    else:
        assert checkpoint_path is not None
        rows = [await control.checkpoints.at_path(caller, checkpoint_path, "checkpoint_path")]
    return s.ListLoopsCheckpointsResponseV1(checkpoints=[render.checkpoint(row) for row in rows])


@router.post("/loops/checkpoints/validate", summary="Check that a checkpoint can be used.")
async def validate_checkpoint(
    body: s.ValidateLoopsCheckpointRequestV1, caller: CallerOf, control: ControlOf
) -> dict[str, str]:
    row = await control.checkpoints.at_path(caller, body.checkpoint_path, "checkpoint_path")
    if body.run_id is not None:
        run = (await control.runs.get(caller, body.run_id)).run
        await control.catalogue.same_model(row.base_model, run.base_model, "checkpoint_path")
    return {}


@router.get("/loops/checkpoints/{checkpoint_id}/files", summary="List a checkpoint's files with links.")
async def checkpoint_files(
    checkpoint_id: str,
    caller: CallerOf,
    control: ControlOf,
    render: RenderOf,
    page_size: Annotated[int, Query(ge=1, le=1000)] = 1000,
    page_token: Annotated[int, Query(ge=0)] = 0,
) -> s.CheckpointFilesResponseV1:
    """The links work without a key for an hour."""
    files = await control.checkpoints.files(caller, checkpoint_id)
    end = page_token + page_size
    return s.CheckpointFilesResponseV1(
        presigned_urls=[render.file(checkpoint_id, f.name, f.size_bytes, f.modified_at) for f in files[page_token:end]],
        next_page_token=end if end < len(files) else None,
        total_count=len(files),
    )


@router.get("/loops/checkpoints/{checkpoint_id}/source", summary="Where a checkpoint's files come from.")
async def checkpoint_source(checkpoint_id: str, caller: CallerOf, control: ControlOf) -> s.CheckpointSourceResponseV1:
    await control.checkpoints.get(caller, checkpoint_id)
    return s.CheckpointSourceResponseV1()


# -- what this server is ------------------------------------------------------------------------------


@router.get("/loops/capabilities", summary="Base models that can be named, with their limits.")
async def capabilities(
    caller: CallerOf,
    control: ControlOf,
    model: str | None = None,
    use_case: Literal["rl", "sft"] | None = None,
    max_seq_len: Annotated[int | None, Query(ge=1)] = None,
) -> s.CapabilitiesResponseV1:
    """``use_case`` changes nothing here: every model can be trained and sampled."""
    models = [
        m
        for m in await control.catalogue.described()
        if (model is None or m.name == model) and (max_seq_len is None or m.max_position_embeddings >= max_seq_len)
    ]
    return s.CapabilitiesResponseV1(
        supported_models=[
            s.SupportedModelV1(
                model_name=m.name,
                max_seq_len=m.max_position_embeddings,
                max_enabled_seq_len=m.max_position_embeddings,
                max_context_length=m.max_position_embeddings,
            )
            for m in models
        ]
    )


@router.get("/teams", summary="The caller's teams.")
async def teams(caller: CallerOf, control: ControlOf) -> s.TeamsResponseV1:
    return s.TeamsResponseV1(
        teams=[
            s.TeamV1(id=t.id, name=t.name, default=t.is_default, created_at=s.iso(t.created_at))
            for t in await control.access.teams_of(caller)
        ]
    )


public = APIRouter(tags=["management"])
"""Routes that need no key: the links of the files route."""


@public.get("/files/{checkpoint_id}/{name:path}", summary="Download a file by its link; Range is served.")
async def file(checkpoint_id: str, name: str, control: ControlOf, expires: int, signature: str) -> FileResponse:
    return FileResponse(control.checkpoints.open_link(checkpoint_id, name, expires, signature))

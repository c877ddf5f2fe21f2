"""Training runs and their checkpoints, listed."""

from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query, Response

from selfloop.control.resources.listings import ListedRun, Page
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.lists import page_of, streamed
from selfloop.server.tinker import names
from selfloop.server.tinker.errors import RESPONSES
from selfloop.types.resources import Checkpoint
from selfloop.types.status import CheckpointTarget

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

AccessScope = Literal["owned", "accessible"]
Json = dict[str, object]
_TYPES = {
    CheckpointTarget.TRAINER: "training",
    CheckpointTarget.SAMPLER: "sampler",
    CheckpointTarget.EXTERNAL: "external",
}
_MAX_PAGE = 1000

Limit = Annotated[int, Query(ge=1, le=_MAX_PAGE)]
Offset = Annotated[int, Query(ge=0, le=2**31)]


@router.get("/training_runs")
async def list_training_runs(
    caller: CallerOf,
    control: ControlOf,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
    project_id: str | None = None,
) -> Response:
    """Runs of the caller's key, newest first; `accessible` adds those of the team, and what other teams published."""
    page = Page(limit, offset)
    listed = await control.listings.runs(caller, page, accessible=access_scope == "accessible", project_id=project_id)
    return await page_of(
        "training_runs",
        listed.runs,
        lambda run: training_run(run, control.access.name_of(run.run.key_id)),
        _cursor(page, listed.total),
    )


@router.get("/training_runs/{run_id}")
async def get_training_run(
    run_id: str, caller: CallerOf, control: ControlOf, access_scope: AccessScope = "owned"
) -> Json:
    """A run of the team; with `accessible` also of another team that published a checkpoint of it."""
    listed = await control.listings.run(caller, names.run_id(run_id), accessible=access_scope == "accessible")
    return training_run(listed, control.access.name_of(listed.run.key_id))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_run_checkpoints(run_id: str, caller: CallerOf, control: ControlOf) -> Response:
    """All checkpoints of a run, newest first; of another team's run those that it published."""
    id = names.run_id(run_id)
    return await streamed(
        b'{"checkpoints":[',
        lambda cut: control.listings.checkpoints_of(caller, id, cut),
        lambda row: msgspec.json.encode(checkpoint(row)),
        lambda num: b'],"cursor":' + msgspec.json.encode(_cursor(Page(num, 0), num)) + b"}",
    )


@router.get("/checkpoints")
async def list_checkpoints(caller: CallerOf, control: ControlOf, limit: Limit = 100, offset: Offset = 0) -> Response:
    """Checkpoints of all runs of the caller's key, newest first."""
    page = Page(limit, offset)
    rows, total = await control.listings.checkpoints(caller, page)
    return await page_of("checkpoints", rows, checkpoint, _cursor(page, total))


def training_run(listed: ListedRun, key_name: str | None) -> Json:
    """A ``TrainingRun``. Another team's run comes without the key's name and without metadata."""
    run = listed.run
    return {
        "training_run_id": names.their_id(run.id),
        "base_model": run.base_model,
        "model_owner": (key_name or run.key_id) if listed.is_own else f"team {run.team_id}",
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora_rank,
        "last_request_time": rfc3339(listed.last_request_at),
        "last_checkpoint": None if listed.last_checkpoint is None else checkpoint(listed.last_checkpoint),
        "last_sampler_checkpoint": None
        if listed.last_sampler_checkpoint is None
        else checkpoint(listed.last_sampler_checkpoint),
        "user_metadata": metadata(run.user_metadata) if listed.is_own else None,
    }


def checkpoint(row: Checkpoint) -> Json:
    """A ``Checkpoint``."""
    target = CheckpointTarget(row.target)
    return {
        "checkpoint_id": f"{names.folder(target)}/{row.name}",
        "checkpoint_type": _TYPES[target],
        "time": rfc3339(row.created_at),
        "tinker_path": names.checkpoint_path(row.run_id, target, row.name),
        "size_bytes": row.size_bytes,
        "public": row.public,
        "base_model": row.base_model,
        "user_metadata": metadata(row.user_metadata),
        "expires_at": None if row.expires_at is None else rfc3339(row.expires_at),
    }


def target_of_type(type: str) -> CheckpointTarget:
    """The inverse of a checkpoint's ``checkpoint_type``."""
    return next(target for target, name in _TYPES.items() if name == type)


def metadata(stored: str | None) -> dict[str, str] | None:
    return None if stored is None else msgspec.json.decode(stored, type=dict[str, str])


def rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")


def _cursor(page: Page, total: int) -> Json:
    return {"offset": page.offset, "limit": page.limit, "total_count": total}

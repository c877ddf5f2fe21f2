"""Every method of the REST client and of the admin client, by its result and awaited."""

import asyncio
import inspect
import json
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import tinker
from shared import MODEL, datum, ids, refused, service, step, trainer
from tinker import types
from tinker.lib.public_interfaces.admin_client import AdminClient

# It reads a token that the client gets where keys are exchanged for tokens, which is not done here.
LOCAL = {"get_telemetry"}
CALLED: set[str] = set()


@cache
def rest() -> tinker.RestClient:
    return tinker.RestClient()


@cache
def run() -> tinker.TrainingClient:
    client = trainer(user_metadata={"renderer_name": "plain", "number": "3"})
    step(client, datum(ids(1)))
    return client


def public(client: type) -> set[str]:
    return {name for name, _f in inspect.getmembers(client, inspect.isfunction) if not name.startswith("_")}


def ways(client: Any, name: str) -> list[Callable[..., Any]]:
    """A method by its result, awaited, and its deprecated twin if it has one."""
    method, twin = getattr(client, name), getattr(client, f"{name}_async", None)

    async def wait(*args: Any, **fields: Any) -> Any:
        return await method(*args, **fields)

    async def wait_for_twin(*args: Any, **fields: Any) -> Any:
        return await twin(*args, **fields)

    CALLED.add(name)
    found = [
        lambda *args, **fields: method(*args, **fields).result(),
        lambda *args, **fields: asyncio.run(wait(*args, **fields)),
    ]
    if twin is not None:
        CALLED.add(f"{name}_async")
        found.append(lambda *args, **fields: asyncio.run(wait_for_twin(*args, **fields)))
    return found


def both(name: str, *args: Any, **fields: Any) -> Any:
    """What the REST client's method gives; the same in every way that it can be called."""
    first, *others = [way(*args, **fields) for way in ways(rest(), name)]
    assert all(other == first for other in others), (first, others)
    return first


def saved(name: str, **fields: Any) -> str:
    return run().save_state(name, **fields).result().path


def checkpoint_at(path: str) -> types.Checkpoint:
    (found,) = [c for c in rest().list_checkpoints(run().model_id).result().checkpoints if c.tinker_path == path]
    return found


def check_capabilities() -> None:
    models = {m.model_name for m in both("get_server_capabilities").supported_models}
    assert MODEL in models


def check_training_runs() -> None:
    path = saved("listed", user_metadata={"step": "1"})
    found = both("get_training_run", run().model_id)
    assert found.base_model == MODEL
    assert found.is_lora
    assert found.lora_rank == 8
    assert found.user_metadata == {"renderer_name": "plain", "number": "3"}
    assert found.last_checkpoint is not None
    assert found.last_checkpoint.tinker_path == path
    assert both("get_training_run_by_tinker_path", path) == found
    listed = both("list_training_runs", limit=100)
    assert found in listed.training_runs
    assert listed.cursor.total_count >= 1
    accessible = rest().list_training_runs(limit=100, access_scope="accessible").result()
    assert found in accessible.training_runs


def check_checkpoints() -> None:
    path = saved("info", user_metadata={"step": "1"})
    sampler = run().save_weights_for_sampler("info").result().path
    listed = both("list_checkpoints", run().model_id)
    kinds = {c.tinker_path: c.checkpoint_type for c in listed.checkpoints}
    assert (kinds[path], kinds[sampler]) == ("training", "sampler")
    everywhere = both("list_user_checkpoints", limit=1000)
    assert {path, sampler} <= {c.tinker_path for c in everywhere.checkpoints}
    assert checkpoint_at(path).user_metadata == {"step": "1"}
    info = both("get_weights_info_by_tinker_path", path)
    assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 8)
    assert info.train_mlp
    assert info.train_attn
    assert info.train_unembed


def check_time_to_live() -> None:
    path = saved("lives", ttl_seconds=7200)
    assert checkpoint_at(path).expires_at is not None
    both("set_checkpoint_ttl_from_tinker_path", path, None)
    assert checkpoint_at(path).expires_at is None
    both("set_checkpoint_ttl_from_tinker_path", path, 3600)
    expires = checkpoint_at(path).expires_at
    assert expires is not None
    assert timedelta(minutes=50) < expires - datetime.now(UTC) <= timedelta(hours=1)


def check_publishing() -> None:
    path = saved("shown")
    both("publish_checkpoint_from_tinker_path", path)
    assert checkpoint_at(path).public
    both("unpublish_checkpoint_from_tinker_path", path)
    assert not checkpoint_at(path).public


def check_deleting() -> None:
    gone = [saved(f"gone-{i}") for i in range(6)]
    for way, path in zip(ways(rest(), "delete_checkpoint_from_tinker_path"), gone[:3], strict=True):
        way(path)
    for i, way in enumerate(ways(rest(), "delete_checkpoint"), start=3):
        way(run().model_id, f"weights/gone-{i}")
    left = {c.tinker_path for c in rest().list_checkpoints(run().model_id).result().checkpoints}
    assert not set(gone) & left
    refused(lambda: rest().delete_checkpoint_from_tinker_path(gone[0]).result(), gone[0], tinker.NotFoundError)


def check_copies() -> None:
    path = saved("origin")
    copies = [way(path, "archive", ttl_seconds=7200) for way in ways(rest(), "copy_weights")]
    assert len({path, *copies}) == 4
    copy = copies[0]
    assert rest().get_weights_info_by_tinker_path(copy).result().lora_rank == 8
    owner = rest().get_training_run_by_tinker_path(copy).result()
    assert owner in rest().list_training_runs(project_id="archive", limit=100).result().training_runs
    service().create_training_client_from_state(copy).result()


def check_external_weights() -> None:
    answer = run().save_weights_external("out", ttl_seconds=3600).result()
    assert answer.path == f"tinker://{run().model_id}/external_weights/out"
    for way in ways(rest(), "get_external_weights_urls"):
        urls = way(answer.path)
        assert urls.expires > datetime.now(UTC)
    with urllib.request.urlopen(urls.urls["adapter_config.json"]) as response:
        config = json.load(response)
    assert (config["r"], config["base_model_name_or_path"]) == (8, MODEL)
    assert checkpoint_at(answer.path).checkpoint_type == "external"


def check_sessions() -> None:
    session = run().model_id.split(":")[0]
    found = both("get_session", session)
    assert run().model_id in found.training_run_ids
    assert session in both("list_sessions", limit=100).sessions
    sampler = run().save_weights_and_get_sampling_client().result()
    assert sampler is not None
    ids_now = rest().get_session(session).result().sampler_ids
    shown = both("get_sampler", ids_now[-1])
    assert (shown.sampler_id, shown.base_model) == (ids_now[-1], MODEL)
    both("assign_session_project", session, "moved")
    projects = rest().list_training_runs(project_id="moved", limit=100).result().training_runs
    assert run().model_id in [each.training_run_id for each in projects]
    request = types.SessionSearchRequest(session_id=session)
    (summary,) = both("search_sessions", request).sessions
    assert (summary.session_id, summary.project_id) == (session, "moved")
    assert summary.status is not None
    assert summary.status.type == "active"


def check_a_trace() -> None:
    step(run(), datum(ids(1)))
    for way in ways(rest(), "export_session_trace"):
        with urllib.request.urlopen(way(run().model_id.split(":")[0])) as response:
            events = json.load(response)["traceEvents"]
        assert {"forward_backward", "optim_step"} <= {event["name"] for event in events}


def check_the_admins_reports() -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = (hour - timedelta(hours=1), hour + timedelta(hours=1))
    path = saved("counted")
    session = run().model_id.split(":")[0]
    for client in (rest(), AdminClient()):
        for way in ways(client, "get_audit_log"):
            entries = way("checkpoints", day=datetime.now(UTC).date()).entries
            assert "checkpoint.saved" in {entry.event for entry in entries if entry.tinker_path == path}
        for way in ways(client, "get_billing_usage"):
            usage = way(*window)
            kinds = {event.event_info.type for event in usage.data if event.session_id == session}
            assert {"training", "checkpoint", "storage"} <= kinds, kinds
            assert all(not event.estimated_cost_usd for event in usage.data)
            assert session in usage.sessions
        for way in ways(client, "get_current_checkpoint_storage_usage"):
            storage = way()
            assert sum(line.size_bytes for line in storage.data) > 0
            assert storage.effective_rate_usd_per_gigabyte_month == 0


def check_whoami() -> None:
    for way in ways(rest(), "whoami"):
        account = way()
        assert account.user_urn.startswith("selfloop:key:"), account
        assert account.org_urn.startswith("tml:organization:"), account
        assert account.email is None, account


def check_every_method_was_called() -> None:
    """Last: a method that a later client has is missed here."""
    missed = (public(tinker.RestClient) | public(AdminClient)) - CALLED
    assert missed == LOCAL, missed

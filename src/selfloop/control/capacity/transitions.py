"""Statuses of runs, trainer deployments and samplers: from which to which, and by whom. Data and questions about it."""

from typing import Literal, NamedTuple

from selfloop.control.capacity.workers import WorkerState
from selfloop.types.status import DeploymentStatus, RunStatus, SamplerStatus

Kind = Literal["run", "deployment", "sampler"]

Actor = Literal["creation", "worker", "request", "idle", "restart", "end"]
"""Who changes a status: whoever makes the resource; the worker of its base model, whose state it shows; a request that
wakes it; its idle time; the start of the server, at which nothing is in memory; whoever ends it."""


class Transition(NamedTuple):
    """``before`` has None for a resource that is being made."""

    kind: Kind
    before: frozenset[str | None]
    after: str
    by: frozenset[Actor]


_D, _S = DeploymentStatus, SamplerStatus

_UP_D = frozenset({_D.CREATED, _D.DEPLOYING, _D.RUNNING, _D.FAILED})
_UP_S = frozenset({_S.BUILDING, _S.DEPLOYING, _S.LOADING_MODEL, _S.ACTIVE, _S.UNHEALTHY, _S.DEPLOY_FAILED, _S.FAILED})
_UP_OR_WAKING_S = _UP_S | {_S.WAKING_UP}
_LIVE_S = _UP_OR_WAKING_S | {_S.SCALED_TO_ZERO}


def _of(kind: Kind, before: frozenset[str] | str | None, after: str, *by: Actor) -> Transition:
    each = before if isinstance(before, frozenset) else {before}
    return Transition(kind, frozenset[str | None]({*each} - {after}), after, frozenset(by))


TABLE: tuple[Transition, ...] = (
    _of("run", None, RunStatus.ACTIVE, "creation"),
    _of("run", None, RunStatus.INACTIVE, "creation"),
    _of("run", RunStatus.ACTIVE, RunStatus.INACTIVE, "end"),
    # A deployment that is made with its end holds the run of an imported or copied checkpoint.
    _of("deployment", None, _D.CREATED, "creation"),
    _of("deployment", None, _D.STOPPED, "creation"),
    _of("deployment", _UP_D, _D.DEPLOYING, "worker"),
    _of("deployment", _UP_D, _D.RUNNING, "worker"),
    _of("deployment", _UP_D, _D.FAILED, "worker"),
    _of("deployment", _D.SCALED_TO_ZERO, _D.DEPLOYING, "request"),
    _of("deployment", _UP_D, _D.SCALED_TO_ZERO, "idle", "restart"),
    _of("deployment", _UP_D | {_D.SCALED_TO_ZERO}, _D.STOPPED, "end"),
    # A sampler of a snapshot is made asleep, as its snapshot is yet to be taken.
    _of("sampler", None, _S.BUILDING, "creation"),
    _of("sampler", None, _S.SCALED_TO_ZERO, "creation"),
    _of("sampler", _UP_S, _S.DEPLOYING, "worker"),
    _of("sampler", _UP_OR_WAKING_S, _S.LOADING_MODEL, "worker"),
    _of("sampler", _UP_OR_WAKING_S, _S.ACTIVE, "worker"),
    _of("sampler", _UP_OR_WAKING_S, _S.UNHEALTHY, "worker"),
    _of("sampler", _UP_OR_WAKING_S - {_S.ACTIVE, _S.FAILED}, _S.DEPLOY_FAILED, "worker"),
    _of("sampler", _UP_OR_WAKING_S, _S.FAILED, "worker"),
    _of("sampler", _S.SCALED_TO_ZERO, _S.WAKING_UP, "request"),
    _of("sampler", _UP_OR_WAKING_S, _S.SCALED_TO_ZERO, "idle", "restart"),
    _of("sampler", _LIVE_S, _S.DEACTIVATING, "end"),
    _of("sampler", _LIVE_S | {_S.DEACTIVATING}, _S.INACTIVE, "end"),
)

SLEEPING: frozenset[str] = frozenset({_D.SCALED_TO_ZERO, _S.SCALED_TO_ZERO})
ENDED: frozenset[str] = frozenset({_D.STOPPED, _S.INACTIVE, RunStatus.INACTIVE})
ENDING: frozenset[str] = ENDED | {_S.DEACTIVATING}
"""What only its end changes."""

HAS_SERVED: frozenset[str] = frozenset({_S.ACTIVE, _S.SCALED_TO_ZERO, _S.WAKING_UP, _S.UNHEALTHY, _S.FAILED})
"""Of a sampler that has been up before: what it cannot load now, it could."""

STABLE: frozenset[str] = frozenset(
    {_S.ACTIVE, _S.UNHEALTHY, _S.DEPLOY_FAILED, _S.INACTIVE, _S.SCALED_TO_ZERO, _S.FAILED}
)

_DEPLOYMENT_STATUS: dict[WorkerState, DeploymentStatus] = {
    "preparing": _D.DEPLOYING,
    "loading": _D.DEPLOYING,
    "restarting": _D.DEPLOYING,
    "crashing": _D.FAILED,
    "ready": _D.RUNNING,
    "failed": _D.FAILED,
}
_SAMPLER_STATUS: dict[WorkerState, SamplerStatus] = {
    "preparing": _S.DEPLOYING,
    "loading": _S.LOADING_MODEL,
    "restarting": _S.LOADING_MODEL,
    "crashing": _S.UNHEALTHY,
    "ready": _S.ACTIVE,
    "failed": _S.DEPLOY_FAILED,
}


def may(kind: Kind, before: str | None, after: str, by: Actor) -> bool:
    """Whether the table has the change."""
    return any(t.kind == kind and before in t.before and t.after == after and by in t.by for t in TABLE)


def check(kind: Kind, before: str | None, after: str, by: Actor) -> None:
    """Assert that the table has the change."""
    assert may(kind, before, after, by), f"a {kind} does not go from {before} to {after} by {by}"


def shown(kind: Kind, before: str, state: WorkerState, *, has_served: bool) -> str | None:
    """The status of capacity whose worker is in ``state``; None where it goes on as it is."""
    if before in SLEEPING or before in ENDING:
        return None
    if before == _S.WAKING_UP and state in ("preparing", "loading"):
        return None
    if kind == "deployment":
        return _DEPLOYMENT_STATUS[state]
    if state == "failed" and has_served:
        return _S.FAILED
    return _SAMPLER_STATUS[state]


def asleep(kind: Kind) -> str:
    return _D.SCALED_TO_ZERO if kind == "deployment" else _S.SCALED_TO_ZERO


def waking(kind: Kind) -> str:
    return _D.DEPLOYING if kind == "deployment" else _S.WAKING_UP


def ended(kind: Kind) -> str:
    return _D.STOPPED if kind == "deployment" else _S.INACTIVE

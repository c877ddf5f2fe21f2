"""Structured log records: one JSON object a line, with the ids of what the work was for."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import msgspec


class Scope(msgspec.Struct, frozen=True):
    """For whom and what the present work is done; ids only, empty where there is none."""

    team_id: str = ""
    key_id: str = ""
    deployment_id: str = ""
    run_id: str = ""
    sampler_id: str = ""
    operation_id: str = ""
    trace_id: str = ""


_NOWHERE = Scope()
_scope: ContextVar[Scope] = ContextVar("selfloop_scope", default=_NOWHERE)


def current() -> Scope:
    return _scope.get()


def bind(**ids: str) -> None:
    """Add ids to the scope of the present task, for the rest of it."""
    _scope.set(msgspec.structs.replace(_scope.get(), **ids))


def bind_only(scope: Scope) -> None:
    """Make this the scope of the present task, for the rest of it."""
    _scope.set(scope)


@contextmanager
def bound(scope: Scope) -> Generator[None]:
    """Work for ``scope`` inside the block."""
    token = _scope.set(scope)
    try:
        yield
    finally:
        _scope.reset(token)


class LogLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record as it is stored.

    Args:
        at_ns: UNIX time in nanoseconds (the clock gives microseconds).
        model: of a worker's own events: its base model.
        details: numbers and names of the event, e.g. ``kind``, ``seconds``, ``tokens``.
        exception: the traceback.
    """

    at_ns: int
    level: str
    logger: str
    message: str
    team_id: str = ""
    deployment_id: str = ""
    run_id: str = ""
    sampler_id: str = ""
    operation_id: str = ""
    trace_id: str = ""
    model: str = ""
    details: dict[str, str | int | float] = {}
    exception: str = ""

    @property
    def text(self) -> str:
        """The message, with the traceback after it."""
        return f"{self.message}\n{self.exception}" if self.exception else self.message


decoder: "msgspec.json.Decoder[LogLine]" = msgspec.json.Decoder(LogLine)
_IDS = ("team_id", "deployment_id", "run_id", "sampler_id", "operation_id", "trace_id")


class JsonFormatter(logging.Formatter):
    """Ids come from the record (``extra``), else from the scope of whoever logs."""

    def format(self, record: logging.LogRecord) -> str:
        scope, own = _scope.get(), record.__dict__
        ids = {name: own.get(name) or getattr(scope, name) for name in _IDS}
        line = LogLine(
            at_ns=int(record.created * 1e6) * 1000,
            level=record.levelname if record.levelname != "CRITICAL" else "ERROR",
            logger=record.name,
            message=record.getMessage(),
            model=own.get("model", ""),
            details=own.get("details", {}),
            exception=self.formatException(record.exc_info) if record.exc_info else "",
            **ids,
        )
        return msgspec.json.encode(line).decode()

"""Watches every request: its trace, its counters, its place in the log."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfloop.control.gateway import Control
from selfloop.control.observe import instruments, tracing
from selfloop.server.shared.dialect import dialect_of
from selfloop.types import logline

_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
# Answers that say nothing of a deployment: no key, or none that may; not yours; not yet; too fast.
_UNCOUNTED = {401, 403, 404, 408, 429}
_KINDS = {"run_id": "runs", "sampler_id": "samplers"}


class Observed:
    """The outermost part of the application."""

    def __init__(self, app: ASGIApp, control: Control) -> None:
        self._app = app
        self._control = control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = str(scope["method"]), str(scope["path"])
        dialect = dialect_of(scope)
        is_poll = dialect.poll_of(method, path) is not None
        ids = {name: id[:64] for name, id in dialect.ids(path).items()}
        status, route, started = 500, "unmatched", time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if is_poll:
            instruments.WAITING_POLLS.inc()
        try:
            with tracing.request_span(method, scope["headers"]) as span:
                with logline.bound(logline.Scope(trace_id=tracing.trace_id(), **ids)):
                    try:
                        await self._app(scope, receive, noting)
                    finally:
                        route = getattr(scope.get("route"), "path", route)
                        if span.is_recording():
                            span.update_name(f"{method} {route}")
                            span.set_attributes({"http.request.method": method, "http.route": route})
                            span.set_attributes({"http.response.status_code": status})
                            span.set_attributes({f"selfloop.{name}": id for name, id in ids.items()})
        finally:
            seconds = time.perf_counter() - started
            known = method if method in _METHODS else "OTHER"
            instruments.REQUESTS.labels(known, route, str(status)).inc()
            instruments.REQUEST_SECONDS.labels(known, route).observe(seconds)
            if is_poll:
                instruments.WAITING_POLLS.dec()
        if method == "POST" and status >= 400 and status not in _UNCOUNTED and ids:
            ((name, id),) = ids.items()
            self._control.observations.refused(_KINDS[name], id, status, seconds)

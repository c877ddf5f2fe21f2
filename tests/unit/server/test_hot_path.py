"""What every request pays for."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from selfloop.control.control import Control
from selfloop.server.app import make_app
from selfloop.server.loops import sampler, trainer
from selfloop.server.management import routes as management
from selfloop.server.settings import Settings


def dependencies(dependant: Dependant) -> Iterator[Dependant]:
    for inner in dependant.dependencies:
        yield inner
        yield from dependencies(inner)


def test_no_dependency_runs_in_a_thread():
    found: set[str] = set()
    for router in (trainer.router, sampler.router, management.router):
        for route in router.routes:
            if isinstance(route, APIRoute):
                calls = [d.call for d in dependencies(route.dependant)]
                found |= {repr(call) for call in calls if not inspect.iscoroutinefunction(call)}
                assert calls, route.path
    assert not found


def test_the_data_plane_is_tried_first():
    document = make_app(Settings("127.0.0.1", 8000, Path("unused")), cast(Control, None)).openapi()
    first = next(path for path in document["paths"] if path != "/healthz")
    assert first.startswith("/loops/runs/")

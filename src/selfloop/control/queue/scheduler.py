"""The actors of all runs."""

import asyncio
import contextlib
from collections.abc import Callable

from selfloop.control.queue.run_actor import RunActor
from selfloop.storage.db import queries_resources
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import OperationRow, RunRow


class Scheduler:
    """The actors of all runs that have something to do or lie in a worker."""

    def __init__(self, db: Database, make_actor: Callable[[RunRow], RunActor]) -> None:
        self._db = db
        self._make_actor = make_actor
        self._actors: dict[str, RunActor] = {}

    async def actor(self, run_id: str) -> RunActor:
        """The run's actor, made from its row when there is none yet."""
        if run_id not in self._actors:
            async with self._db.look_up() as session:
                rows = await queries_resources.run_rows(session, {run_id})
            return self.adopt(rows[run_id])
        return self._actors[run_id]

    def adopt(self, run: RunRow) -> RunActor:
        """The run's actor; ``run`` is its present row, which the actor goes on with if it is new."""
        if run.id not in self._actors:
            self._actors[run.id] = self._make_actor(run)
        return self._actors[run.id]

    def known(self, run_id: str) -> RunActor | None:
        return self._actors.get(run_id)

    async def suspend(self, deployment_id: str) -> None:
        """Store and unload every run of a deployment."""
        actors = [actor for actor in self._actors.values() if actor.run.deployment_id == deployment_id]
        await asyncio.gather(*(actor.suspend() for actor in actors))

    async def end(self, run_id: str) -> list[OperationRow]:
        """Stop a run's actor; returns the operations that will now never run."""
        actor = self._actors.pop(run_id, None)
        if actor is None:
            return []
        await actor.close()
        return actor.drain()

    async def stop(self, grace_s: float) -> None:
        """Store what the workers hold, waiting ``grace_s`` for what is running; the journal has the rest."""
        actors = list(self._actors.values())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(actor.halt() for actor in actors)), grace_s)
        await asyncio.gather(*(actor.stop() for actor in actors))

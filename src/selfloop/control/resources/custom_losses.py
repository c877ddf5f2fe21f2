"""Losses that a script uploaded: kept with its session, for the runs of that session alone."""

import time
from collections import OrderedDict

import msgspec

from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.storage.db import queries_resources
from selfloop.storage.db.tables import CustomLossRow
from selfloop.types.custom_loss import CustomLoss, check
from selfloop.types.errors import BadRequest, NotFound

MAX_LOSSES = 1000
_KEPT_IN_MEMORY = 64


class CustomLosses:
    def __init__(self, context: Context) -> None:
        self._c = context
        self._recent: OrderedDict[tuple[str, int], CustomLoss] = OrderedDict()

    async def create(self, caller: Caller, session_id: str, number: int, loss: CustomLoss) -> None:
        """Check a loss and keep it as the session's loss ``number``; the same loss again changes nothing.

        Raises:
            BadRequest: the graph cannot be served, or the number is taken or too large.
            NotFound: no such session.
        """
        await self._check_session(caller, session_id)
        if not 0 <= number < MAX_LOSSES:
            raise BadRequest("custom_loss_seq_id", f"0 to {MAX_LOSSES - 1}: as many losses has a session; got {number}")
        check(loss)
        definition = msgspec.msgpack.encode(loss)
        row = CustomLossRow(session_id=session_id, number=number, created_at=time.time(), definition=definition)
        async with self._c.db.write() as session:
            known = await queries_resources.custom_loss(session, session_id, number)
            if known is None:
                session.add(row)
            elif known.definition != definition:
                raise BadRequest("custom_loss_seq_id", f"a number not used before; {number} is another loss")

    async def get(self, caller: Caller, session_id: str, number: int) -> CustomLoss:
        """Raises :class:`NotFound` for another team's, too."""
        await self._check_session(caller, session_id)
        key = session_id, number
        if key not in self._recent:
            async with self._c.db.read() as session:
                row = await queries_resources.custom_loss(session, session_id, number)
            if row is None:
                raise NotFound("custom loss", f"{session_id}:loss:{number}")
            self._recent[key] = msgspec.msgpack.decode(row.definition, type=CustomLoss)
            if len(self._recent) > _KEPT_IN_MEMORY:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]

    async def _check_session(self, caller: Caller, session_id: str) -> None:
        async with self._c.db.read() as session:
            row = await queries_resources.session_row(session, session_id)
        if row is None or row.team_id != caller.team_id:
            raise NotFound("session", session_id)

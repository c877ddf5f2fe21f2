"""Losses that a script uploads, and their names."""

import re
from typing import Any

from fastapi import APIRouter, Request

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.body import off_loop, read_body
from selfloop.server.shared.decode import decode
from selfloop.server.tinker import futures, wire
from selfloop.server.tinker.errors import RESPONSES
from selfloop.types.custom_loss import CustomLoss
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.resources import Run

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

NAME = "custom"
_FIELD = "loss_fn_config.loss_id"
_MAX_BYTES = 2**20
_ID = re.compile(r"([a-z0-9]{7}):loss:(0|[1-9][0-9]{0,5})")


@router.post("/create_custom_loss", openapi_extra=wire.SCHEMAS.json_body(wire.CreateCustomLoss))
async def create_custom_loss(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, str]:
    """Keep a traced loss for the session's models; it is checked here, and nothing in it is ever executed as code."""
    raw = await read_body(request)
    if len(raw) > _MAX_BYTES:
        raise BadRequest("graph", f"at most {_MAX_BYTES} bytes")
    body = await off_loop(len(raw), lambda: decode(raw, wire.CreateCustomLoss))
    if body.graph.format != 1:
        raise BadRequest("graph.format", f"1, got {body.graph.format}")
    loss = CustomLoss(body.name[:200], body.inputs, body.graph.nodes)
    await control.custom_losses.create(caller, body.session_id, body.custom_loss_seq_id, loss)
    return futures.created_loss(body.session_id, body.custom_loss_seq_id)


async def asked(message: Any, caller: Caller, control: Control, run: Run) -> CustomLoss | None:
    """The uploaded loss that a ``ForwardBackwardRequest`` is to be computed with; None for one of ours.

    Raises:
        BadRequest: it names none of the run's session.
    """
    if message.loss_fn != NAME:
        return None
    loss_id = message.loss_fn_config_v2.get("loss_id")
    names = {*message.loss_fn_config, *message.loss_fn_config_v2}
    if loss_id is None or loss_id.WhichOneof("value") != "text" or names != {"loss_id"}:
        raise BadRequest(_FIELD, "the id that create_custom_loss gave, and nothing besides")
    match = _ID.fullmatch(loss_id.text)
    if match is None or match[1] != run.session_id:
        raise BadRequest(_FIELD, f"a loss of the model's own session; got {loss_id.text[:100]!r}")
    try:
        return await control.custom_losses.get(caller, match[1], int(match[2]))
    except NotFound:
        raise BadRequest(_FIELD, f"a loss of the model's own session; {loss_id.text!r} is not known") from None

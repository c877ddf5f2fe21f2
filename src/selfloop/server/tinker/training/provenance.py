"""The provenance spans of this dialect's datums, with the sequences that they name."""

from collections.abc import Sequence
from typing import Any

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server.shared.provenance import Known, Span
from selfloop.server.tinker import names
from selfloop.types.errors import SelfloopError
from selfloop.types.resources import Run

NEEDS_RECORD = "stable_reinforce"


async def known(message: Any, caller: Caller, control: Control, run: Run) -> Known:
    """What the sequences are that a ``ForwardBackwardRequest`` of ``run`` names, by the ids that it gives them."""
    named = {
        span.sequence_id
        for datum in message.data
        for field in (datum.model_input_spans, datum.loss_fn_input_spans)
        for span in spans(field)
    }
    ours = {id: _our_id(id) for id in named}
    found = await control.sampling.recorded.use(caller, set(ours.values())) if ours else {}
    sequences = {theirs: found[id] for theirs, id in ours.items() if id in found}
    return Known(sequences, must_be_recorded=message.loss_fn == NEEDS_RECORD, model_name=run.model_name)


def spans(field: Any) -> Sequence[Span]:
    """Of a repeated ``ProvenanceSpan``."""
    read: list[Span] = []
    for each in field:
        kind = each.WhichOneof("span")
        span = each.prompt_tokens if kind == "prompt_tokens" else each.sampled_tokens
        read.append(Span(span.sequence_id, kind == "prompt_tokens", span.offset, span.length))
    return read


def _our_id(theirs: str) -> str:
    sampler, _, rest = theirs.partition("/")
    try:
        return f"{names.sampler_id(sampler)}/{rest}"
    except SelfloopError:
        return theirs

"""What every dialect that samples shares: ranges of the parameters, weights by header, structured outputs."""

import re
from typing import Annotated, Any

import msgspec
from fastapi import Depends, Request

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.sampling.service import Weights
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.decode import to_json
from selfloop.types.errors import BadRequest
from selfloop.types.resources import Sampler
from selfloop.types.sampling import SamplingParams, StructuredOutput, room_after

POLICY_VERSION_HEADER = "x-trainers-policy-version"
MAX_SAMPLES = 256
MAX_TOP_LOGPROBS = 20

# A repetition penalty near 0 would make logits that are no numbers; vLLM takes any above 0.
_PENALTY_RANGES = {
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
}
_MAX_BIAS = 100
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_VERSION = re.compile(r"[0-9]{1,18}")
# Shorter than the 30 s that proxies and clients commonly allow a held request.
_FLOOR_HOLD_S = 25.0


async def sampler_of(sampler_id: str, caller: CallerOf, control: ControlOf) -> Sampler:
    return await control.samplers.get(caller, sampler_id)


SamplerOf = Annotated[Sampler, Depends(sampler_of)]


def within(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        expected = str(low) if low == high else f"{low} to {high}"
        raise BadRequest(field, f"{expected}, got {value}")


def check_ranges(temperature: float, top_p: float, top_k: int, seed: int | None) -> None:
    """Raises :class:`BadRequest` for a parameter outside the range where sampling is defined."""
    if not 0.0 <= temperature < float("inf"):
        raise BadRequest("temperature", f"a number >= 0 (0 is greedy), got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise BadRequest("top_p", f"a number in (0, 1], got {top_p}")
    if not -1 <= top_k <= 2**31 - 1:
        raise BadRequest("top_k", f"-1 or 0 for all tokens, or a number >= 1; got {top_k}")
    if seed is not None:
        within("seed", seed, -(2**63), 2**63 - 1)


class PenaltyFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What changes logits before a token is sampled, in OpenAI's words and vLLM's; null is as good as absent."""

    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


def with_penalties(params: SamplingParams, body: PenaltyFields) -> SamplingParams:
    """``params`` with what ``body`` asks for. Raises :class:`BadRequest` for what is outside its range."""
    given = {
        "min_p": 0.0 if body.min_p is None else body.min_p,
        "frequency_penalty": 0.0 if body.frequency_penalty is None else body.frequency_penalty,
        "presence_penalty": 0.0 if body.presence_penalty is None else body.presence_penalty,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
    }
    for name, (low, high) in _PENALTY_RANGES.items():
        if not low <= given[name] <= high:
            raise BadRequest(name, f"a number from {low:g} to {high:g}, got {given[name]:g}")
    biases = {_token_id(key): bias for key, bias in (body.logit_bias or {}).items()}
    for token, bias in biases.items():
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise BadRequest(f"logit_bias.{token}", f"a number from -{_MAX_BIAS} to {_MAX_BIAS}, got {bias:g}")
    return msgspec.structs.replace(params, logit_bias=biases, **given)


def _token_id(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise BadRequest(f"logit_bias.{key[:100]}", "a token id as the key: digits")
    return int(key)


def stop_strings(stop: str | list[str] | None) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop or []
    if "" in strings:
        raise BadRequest("stop", "strings of at least one character")
    return strings


def refuse_idempotency_key(request: Request) -> None:
    """For routes that sample anew whenever they are asked."""
    if "idempotency-key" in request.headers:
        raise BadRequest("Idempotency-Key", "none: each request is sampled anew; the same seed gives the same sample")


def room_for(prompt: list[int], field: str, max_seq_len: int, *, scored: bool = False) -> int:
    """How many tokens may be sampled after the prompt, which may fill the model where it is only ``scored``.

    Raises :class:`BadRequest` when none may.
    """
    if not prompt:
        raise BadRequest(field, "a prompt of at least one token")
    room = room_after(len(prompt), max_seq_len, scored=scored)
    if room < 1:
        longest = max_seq_len if scored else max_seq_len - 1
        raise BadRequest(field, f"at most {longest} tokens, got {len(prompt)}")
    return room


def check_identity(request: Request, sampler: Sampler) -> None:
    """Headers that name the run or the sampler must name this one's."""
    for header, own in (("x-run-id", sampler.run_id), ("x-sampler-id", sampler.id)):
        named = request.headers.get(header)
        if named is not None and named != own:
            raise BadRequest(header, f"{own}, which this sampler serves; got {named!r}")


async def weights_of(
    request: Request,
    sampler: Sampler,
    caller: Caller,
    control: Control,
    pinned: str | None = None,
    pinned_by: str = "model",
) -> Weights:
    """The weights that the headers ask for, or the checkpoint that the body's field ``pinned_by`` pins."""
    path, field = request.headers.get("x-checkpoint-path"), "X-Checkpoint-Path"
    if pinned is not None:
        if path not in (None, pinned):
            raise BadRequest(field, f"{pinned} as in {pinned_by}, or none; got {path[:200]!r}")
        path, field = pinned, pinned_by
    checkpoint = None
    if path is not None and (checkpoint := await control.samplers.served_named(sampler, path)) is None:
        checkpoint = await control.checkpoints.readable_at(caller, path, field)
        await control.catalogue.same_model(checkpoint.base_model, sampler.base_model, field)
    floor = request.headers.get("x-min-policy-version")
    if floor is not None and not _VERSION.fullmatch(floor):
        raise BadRequest("X-Min-Policy-Version", f"a policy version (a number >= 0), got {floor[:200]!r}")
    min_version = None if floor is None else int(floor)
    return await control.sampling.weights(sampler, checkpoint, min_version, _FLOOR_HOLD_S)


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's object of that name; exactly one of the first five may be set, the others are not served."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_REFUSED = (
    "structural_tag",
    "whitespace_pattern",
    "disable_fallback",
    "disable_any_whitespace",
    "disable_additional_properties",
)


def structured_output(body: StructuredOutputs, field: str = "structured_outputs") -> StructuredOutput:
    """What the samples must match. Raises :class:`BadRequest` unless exactly one kind is named."""
    for name in _REFUSED:
        if getattr(body, name) not in (None, False):
            raise BadRequest(f"{field}.{name}", "null: not served here")
    named = [name for name in _KINDS if getattr(body, name) not in (None, False)]
    if len(named) != 1:
        raise BadRequest(field, f"exactly one of {', '.join(_KINDS)}; got {', '.join(named) or 'none'}")
    if body.json is not None:
        return json_schema(body.json, f"{field}.json")
    if body.choice is not None:
        return choice_of(body.choice, f"{field}.choice")
    if body.json_object:
        return ANY_JSON_OBJECT
    if body.regex is not None:
        return regex_of(body.regex, f"{field}.regex")
    assert body.grammar is not None
    return grammar_of(body.grammar, f"{field}.grammar")


ANY_JSON_OBJECT = StructuredOutput("json_schema", '{"type":"object"}')


def json_schema(schema: dict[str, Any] | str, field: str) -> StructuredOutput:
    """A JSON schema, as an object or as its text."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            raise BadRequest(field, "a JSON schema: an object, or a string that holds one") from None
    return StructuredOutput("json_schema", to_json(schema, field).decode())


def choice_of(choices: list[str], field: str) -> StructuredOutput:
    if not choices or "" in choices:
        raise BadRequest(field, "at least one string, none of them empty")
    return StructuredOutput("choice", msgspec.json.encode(choices).decode())


def regex_of(regex: str, field: str) -> StructuredOutput:
    if not regex:
        raise BadRequest(field, "a regular expression of at least one character")
    return StructuredOutput("regex", regex)


def grammar_of(grammar: str, field: str) -> StructuredOutput:
    if not grammar:
        raise BadRequest(field, "a grammar of at least one rule")
    return StructuredOutput("grammar", grammar)

"""From the fields that both routes share to one :class:`SampleSpec`; what is not served is refused by name."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from selfloop.control.sampling.service import SampleSpec
from selfloop.server.openai import wire
from selfloop.server.shared.sampling import (
    MAX_SAMPLES,
    check_ranges,
    choice_of,
    grammar_of,
    json_schema,
    regex_of,
    stop_strings,
    structured_output,
    with_penalties,
    within,
)
from selfloop.types.errors import BadRequest
from selfloop.types.images import Image
from selfloop.types.sampling import SamplingParams, StructuredOutput

# What asks for nothing, beside null: the defaults that some clients always send.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "annotations": ([],),
    "allowed_callers": (["direct"],),
    "background": (False,),
    "caller": ({"type": "direct"},),
    "defer_loading": (False,),
    "detail": ("auto",),
    "include_obfuscation": (False,),
    "summary": ("auto",),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
}
_INSTEAD = {
    "functions": "null: use tools",
    "function_call": "null: use tool_choice, or tool_calls in messages",
    "custom": "null: tools of type function are served",
    "detail": 'null or "auto": the model\'s processor says how large images are made',
    "file_id": "null: files are not kept; send a data URL as image_url",
    "previous_response_id": "null: responses are not kept; send the whole conversation as input",
    "conversation": "null: conversations are not kept; send the whole of it as input",
}


def refuse_unserved(body: msgspec.Struct, prefix: str = "") -> None:
    """Raises :class:`BadRequest` for a known field that asks for something that is not served."""
    for field in msgspec.structs.fields(body):
        value: object = getattr(body, field.name)
        if field.type is wire.Unserved and value is not None and value not in _NEUTRAL.get(field.name, ()):
            neutral = [msgspec.json.encode(v).decode() for v in _NEUTRAL.get(field.name, ())]
            expected = _INSTEAD.get(field.name, " or ".join(["null", *neutral]) + ": not served here")
            raise BadRequest(prefix + field.name, expected)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the fields of both routes ask for; ``structured_by`` names the field that constrains the text."""

    num_samples: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]
    structured: StructuredOutput | None
    structured_by: str


def asked(body: wire.SamplingBody) -> Asked:
    """The checked fields of both routes."""
    refuse_unserved(body)
    if body.stream_options is not None:
        if not body.stream:
            raise BadRequest("stream_options", "null unless stream is true")
        if body.stream_options.include_obfuscation:
            raise BadRequest("stream_options.include_obfuscation", "null or false: not served here")
    num_samples = 1 if body.n is None else body.n
    within("n", num_samples, 1, MAX_SAMPLES)
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    top_k = 0 if body.top_k is None else body.top_k
    check_ranges(temperature, top_p, top_k, body.seed)
    return Asked(num_samples, temperature, top_p, max(top_k, 0), stop_strings(body.stop), *_structured(body))


def spec_of(
    body: wire.SamplingBody,
    prompt: list[int],
    asked: Asked,
    max_tokens: int,
    *,
    top_logprobs: int = 0,
    prompt_logprobs: int | None = None,
    token_bytes: bool = False,
    images: Sequence[Image] = (),
) -> SampleSpec:
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        seed=body.seed,
        stop=asked.stop,
        stop_token_ids=body.stop_token_ids or [],
        structured=asked.structured,
    )
    params = with_penalties(params, body)
    return SampleSpec(
        prompt, asked.num_samples, params, prompt_logprobs, top_logprobs, token_bytes, images=list(images)
    )


def exactly_one_structure(**given: StructuredOutput | None) -> tuple[StructuredOutput | None, str]:
    """The one that is given with its field, or None. Raises :class:`BadRequest` for several."""
    named = [(value, name) for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise BadRequest(named[1][1], f"null when {named[0][1]} constrains the text already")
    return named[0] if named else (None, "")


def _structured(body: wire.SamplingBody) -> tuple[StructuredOutput | None, str]:
    outputs, schema, choice = body.structured_outputs, body.guided_json, body.guided_choice
    regex, grammar = body.guided_regex, body.guided_grammar
    return exactly_one_structure(
        structured_outputs=None if outputs is None else structured_output(outputs),
        guided_json=None if schema is None else json_schema(schema, "guided_json"),
        guided_choice=None if choice is None else choice_of(choice, "guided_choice"),
        guided_regex=None if regex is None else regex_of(regex, "guided_regex"),
        guided_grammar=None if grammar is None else grammar_of(grammar, "guided_grammar"),
    )

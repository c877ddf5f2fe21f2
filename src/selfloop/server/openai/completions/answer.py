"""The answer to a completion request, whole or as events."""

from collections.abc import Sequence

import msgspec
from fastapi import Request
from fastapi.responses import Response

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.sampling.service import SampleSpec
from selfloop.server.openai import wire
from selfloop.server.openai.completions.choices import CompletionChoice, Echo
from selfloop.server.openai.completions.request import CompletionRequest, completion_request
from selfloop.server.openai.params import spec_of
from selfloop.server.openai.sampling import Chunks, Head, Json, Sampling, checked_max_tokens, num_sampled, usage
from selfloop.server.shared.connection import while_connected
from selfloop.server.shared.sampling import weights_of
from selfloop.server.shared.served_models import Target
from selfloop.types.resources import Sampler


async def completion_answer(
    request: Request, body: wire.CompletionBody, target: Target, caller: Caller, control: Control
) -> Response:
    """Texts or token ids continued, whole or streamed."""
    sampler = target.sampler
    asked = completion_request(body)
    weights = await while_connected(request, weights_of(request, sampler, caller, control, target.pinned))
    prompts = await while_connected(request, _prompts(asked, body, sampler, control))
    for at, prompt in enumerate(prompts):
        checked_max_tokens(
            asked.num_sampled, "max_tokens", prompt, asked.field_of(at), sampler, scored=asked.scores_prompt
        )
    echoes = await while_connected(request, _echoes(asked, prompts, sampler, control))
    specs = [_spec(body, asked, prompt) for prompt in prompts]
    n = asked.asked.num_samples
    choices = [
        CompletionChoice(at * n + i, asked.num_top, bool(body.return_token_ids), echo, asked.max_tokens > 0)
        for at, echo in enumerate(echoes)
        for i in range(n)
    ]
    head = Head.new("cmpl", body.model)
    sampling = Sampling(request, sampler, control, weights, specs, asked.asked)
    if body.stream:
        opening = [chunk for choice in choices if (chunk := choice.opening()) is not None]
        chunks = Chunks(head, "text_completion", body.stream_options, {})
        return await sampling.stream(chunks, opening, lambda i, delta: choices[i].grown(delta))
    results = await sampling.results()

    def rendered() -> bytes:
        whole: list[Json] = []
        for choice in choices:
            at, i = divmod(choice.index, n)
            ids: Json = {"prompt_token_ids": prompts[at]} if body.return_token_ids else {}
            whole.append(choice.whole(results[at].sequences[i], results[at]) | ids)
        num_shown = num_sampled(results) if asked.max_tokens > 0 else 0
        used = usage(sum(map(len, prompts)), sum(result.num_cached for result in results), num_shown)
        return msgspec.json.encode(head.render("text_completion", whole, used))

    return await sampling.answer(rendered, results)


def _spec(body: wire.CompletionBody, asked: CompletionRequest, prompt: list[int]) -> SampleSpec:
    return spec_of(
        body,
        prompt,
        asked.asked,
        asked.num_sampled,
        top_logprobs=asked.num_top or 0,
        prompt_logprobs=(asked.num_top or 0) if asked.scores_prompt else None,
        token_bytes=asked.num_top is not None,
    )


async def _prompts(
    asked: CompletionRequest, body: wire.CompletionBody, sampler: Sampler, control: Control
) -> Sequence[list[int]]:
    if not asked.texts:
        return asked.prompts
    return await control.sampling.tokenize(sampler, asked.texts, add_special_tokens=body.add_special_tokens)


async def _echoes(
    asked: CompletionRequest, prompts: Sequence[list[int]], sampler: Sampler, control: Control
) -> list[Echo | None]:
    if not asked.echo:
        return [None] * len(prompts)
    echoes: list[Echo | None] = []
    for at, prompt in enumerate(prompts):
        raws = await control.sampling.token_bytes(sampler, prompt)
        text = asked.texts[at] if asked.texts else b"".join(raws).decode(errors="replace")
        echoes.append(Echo(text, raws))
    return echoes

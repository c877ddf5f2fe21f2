"""The answer to a chat request, whole or as events."""

import msgspec
from fastapi import Request
from fastapi.responses import Response

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server.openai import wire
from selfloop.server.openai.chat.choices import ChatChoice
from selfloop.server.openai.chat.request import chat_request
from selfloop.server.openai.params import spec_of
from selfloop.server.openai.sampling import Chunks, Head, Json, Sampling, checked_max_tokens, num_sampled, usage
from selfloop.server.shared.body import num_received, off_loop
from selfloop.server.shared.connection import while_connected
from selfloop.server.shared.sampling import weights_of
from selfloop.server.shared.served_models import Target


async def chat_answer(
    request: Request, body: wire.ChatBody, target: Target, caller: Caller, control: Control
) -> Response:
    """The answer to a conversation, whole or streamed."""
    sampler = target.sampler
    facts = await while_connected(request, control.sampling.chat_facts(sampler))
    asked = await off_loop(num_received(request), lambda: chat_request(body, facts.template, facts.vision))
    weights = await while_connected(request, weights_of(request, sampler, caller, control, target.pinned))
    prompt, images = await while_connected(request, control.sampling.render_chat(sampler, asked.chat))
    max_tokens = checked_max_tokens(asked.max_tokens, asked.max_tokens_field, prompt, "messages", sampler)
    spec = spec_of(
        body,
        prompt,
        asked.asked,
        max_tokens,
        top_logprobs=asked.top_logprobs or 0,
        token_bytes=asked.top_logprobs is not None,
        images=images,
    )
    choices = [
        ChatChoice(i, asked.tools, asked.top_logprobs is not None, bool(body.return_token_ids))
        for i in range(spec.num_samples)
    ]
    head = Head.new("chatcmpl", body.model)
    prompt_ids: Json = {"prompt_token_ids": prompt} if body.return_token_ids else {}
    sampling = Sampling(request, sampler, control, weights, [spec], asked.asked)
    if body.stream:
        opening = [choice.opening() for choice in choices]
        chunks = Chunks(head, "chat.completion.chunk", body.stream_options, prompt_ids)
        return await sampling.stream(chunks, opening, lambda i, delta: choices[i].grown(delta))
    (result,) = await sampling.results()

    def rendered() -> bytes:
        whole = [choice.whole(sequence) for choice, sequence in zip(choices, result.sequences, strict=True)]
        used = usage(len(prompt), result.num_cached, num_sampled([result]))
        return msgspec.json.encode(head.render("chat.completion", whole, used) | prompt_ids)

    return await sampling.answer(rendered, [result])

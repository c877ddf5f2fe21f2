"""vLLM's routes about text: tokens of a prompt or of messages, text of tokens, and the tokenizer's configuration."""

import asyncio

import msgspec
from fastapi import Request

from selfloop.control.gateway import Control
from selfloop.server.openai import wire
from selfloop.server.openai.chat.request import chat_request
from selfloop.server.openai.logprobs import token_text
from selfloop.server.openai.params import refuse_unserved
from selfloop.server.shared.body import num_received, off_loop
from selfloop.server.shared.connection import while_connected
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.model_folder import read_chat_template
from selfloop.types.resources import Sampler

Json = dict[str, object]


async def tokenized(request: Request, body: wire.TokenizeBody, sampler: Sampler, control: Control) -> Json:
    """``count``, ``max_model_len``, ``tokens`` and, where asked for, ``token_strs``."""
    refuse_unserved(body)
    if body.messages is not None:
        tokens = await _of_messages(request, body, sampler, control)
    else:
        tokens = await _of_prompt(request, body, sampler, control)
    strings = None
    if body.return_token_strs:
        raws = await while_connected(request, control.sampling.token_bytes(sampler, tokens))
        strings = [token_text(raw) for raw in raws]
    return {"count": len(tokens), "max_model_len": sampler.max_seq_len, "tokens": tokens, "token_strs": strings}


async def _of_prompt(request: Request, body: wire.TokenizeBody, sampler: Sampler, control: Control) -> list[int]:
    if body.prompt is None:
        raise BadRequest("prompt", "a string, or messages in its place")
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"):
        if getattr(body, name):
            raise BadRequest(name, "null with prompt: no chat template is read")
    add = body.add_special_tokens is not False
    (tokens,) = await while_connected(
        request, control.sampling.tokenize(sampler, [body.prompt], add_special_tokens=add)
    )
    return tokens


async def _of_messages(request: Request, body: wire.TokenizeBody, sampler: Sampler, control: Control) -> list[int]:
    assert body.messages is not None
    if body.prompt is not None:
        raise BadRequest("prompt", "null with messages")
    if body.add_special_tokens:
        raise BadRequest("add_special_tokens", "false or null with messages: the chat template writes its own")
    chat = wire.ChatBody(
        model=sampler.base_model,
        messages=body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=body.tools,
    )
    facts = await while_connected(request, control.sampling.chat_facts(sampler))
    asked = await off_loop(num_received(request), lambda: chat_request(chat, facts.template, facts.vision))
    return (await while_connected(request, control.sampling.render_chat(sampler, asked.chat))).tokens


async def detokenized(request: Request, body: wire.DetokenizeBody, sampler: Sampler, control: Control) -> Json:
    """``prompt``, the text of the tokens; special ones by their names."""
    raws = await while_connected(request, control.sampling.token_bytes(sampler, body.tokens, "tokens"))
    return {"prompt": b"".join(raws).decode(errors="replace")}


async def tokenizer_info(base_model: str, control: Control) -> Json:
    """``tokenizer_config.json`` of the model's folder, with its chat template."""
    folder = await control.catalogue.folder(base_model)
    if folder is None:
        raise NotFound("model", base_model)
    try:
        raw = await asyncio.to_thread((folder / "tokenizer_config.json").read_bytes)
    except FileNotFoundError:
        raise NotFound("tokenizer_info", base_model, "its folder has no tokenizer_config.json") from None
    config = msgspec.json.decode(raw, type=dict[str, object])
    template = await asyncio.to_thread(read_chat_template, folder)
    return config | {"chat_template": template, "tokenizer_class": config.get("tokenizer_class")}

"""Conversations as the model's own chat template writes them."""

import json
from pathlib import Path
from typing import Any

import msgspec

from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.model_tokenizer import BeyondVocabulary, ModelTokenizer
from selfloop.types.tool_templates import template_with_tools
from selfloop.types.vision import VisionFacts, read_vision
from selfloop.worker.protocol import RenderChat, RenderedChat
from selfloop.worker.text.chat_render import Render, too_much_memory
from selfloop.worker.text.helper_process import Helper, HelperEnded
from selfloop.worker.text.image_places import ImagePlaces, Written

_CPU_LIMIT_S = 2.0
_PATIENCE_S = 30.0
_MAX_BYTES = 4 * 2**20
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What the caller says in fields of its own, or may not say at all.
_RESERVED = frozenset(
    {
        "messages",
        "conversations",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
    }
)
# One a process; started for the first conversation.
_renderer = Helper("selfloop.worker.text.chat_render", _PATIENCE_S)
_messages_decoder = msgspec.json.Decoder(list[dict[str, Any]])
_options_decoder = msgspec.json.Decoder(dict[str, Any])


class ChatTemplate:
    """The template of a model folder, found and rendered as ``AutoTokenizer.apply_chat_template`` does.

    Args:
        templates: by name; the only one of a folder is "default".
        special_tokens: variables of the template, e.g. ``bos_token``.
        places: how it writes images; None where the model sees none.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        templates: dict[str, str],
        special_tokens: dict[str, str],
        places: ImagePlaces | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._templates = templates
        self._special_tokens = special_tokens
        self._places = places

    @classmethod
    def load(cls, model_dir: Path, tokenizer: ModelTokenizer) -> "ChatTemplate":
        config = _read_json(model_dir / "tokenizer_config.json")
        # The older file of names counts only for what the newer one lacks.
        named = _read_json(model_dir / "special_tokens_map.json") | config
        special_tokens = {name: _content(named[name]) for name in _SPECIAL_TOKENS if named.get(name) is not None}
        vision = read_vision(model_dir)
        places = ImagePlaces(vision, tokenizer) if isinstance(vision, VisionFacts) else None
        return cls(tokenizer, _templates(model_dir, config), special_tokens, places)

    def tokens(self, command: RenderChat) -> RenderedChat:
        """Token ids of a conversation. Raises what :meth:`write` raises."""
        written = self.write(command)
        try:
            return written.rendered(self._tokenizer.encode(written.text, add_special_tokens=False))
        except BeyondVocabulary as error:
            raise BadRequest(field_with(error.token, command), str(error)) from None
        except ValueError as error:
            raise BadRequest("messages", str(error)) from None

    def write(self, command: RenderChat) -> Written:
        """A conversation as the template writes it, which is still to be tokenized.

        Raises:
            BadRequest: no template, or one that refuses this conversation; names the field.
        """
        messages = _decode(_messages_decoder, "messages", command.messages, "a list of objects")
        if not messages:
            raise BadRequest("messages", "at least one message")
        tools = command.tools and _decode(_messages_decoder, "tools", command.tools, "a list of objects")
        options = command.options and _decode(
            _options_decoder, "chat_template_kwargs", command.options, "an object with variables of the template"
        )
        if not command.num_images:
            return Written(self._render(command, messages, tools or None, options or {}))
        if self._places is None:
            raise BadRequest("messages", "no images: the served model takes text only")
        hidden = self._places.hide([messages, tools or None, options or {}])
        return self._places.write(self._render(command, *hidden.values), hidden, command.num_images)

    def _render(
        self,
        command: RenderChat,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        options: dict[str, Any],
    ) -> str:
        if reserved := sorted(_RESERVED & options.keys()):
            raise BadRequest("chat_template_kwargs", f"none of {', '.join(sorted(_RESERVED))}; got {reserved[0]}")
        if command.continue_final_message and command.add_generation_prompt:
            raise BadRequest("continue_final_message", "false where add_generation_prompt is true")
        request = Render(
            messages=messages,
            tools=tools,
            template=self._template(tools is not None),
            continue_final_message=command.continue_final_message,
            add_generation_prompt=command.add_generation_prompt,
            variables={**self._special_tokens, **options},
            cpu_s=_CPU_LIMIT_S,
        )
        try:
            reply: dict[str, str] = msgspec.json.decode(_renderer.ask(msgspec.json.encode(request)))
        except HelperEnded as ended:
            if ended.status >= 0:
                raise OperationFailed(f"the process that renders chat templates {ended}") from None
            raise BadRequest("messages", _render_limits()) from None
        if "error" in reply:
            raise BadRequest("messages", reply["error"])
        return reply["text"]

    def _template(self, with_tools: bool) -> str:
        if with_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            own = self._templates["default"]
            return template_with_tools(own) if with_tools else own
        if self._templates:
            names = ", ".join(sorted(self._templates))
            raise BadRequest("messages", f"a model with a default chat template; this one has only {names}")
        raise BadRequest("messages", "a model with a chat template; this one has none")


def _render_limits() -> str:
    return f"{too_much_memory()} and {_CPU_LIMIT_S:g} s of computing"


def field_with(token: str, command: RenderChat) -> str:
    """The part of a conversation, which was rendered, whose text has ``token``."""
    tools, options = (None if part is None else msgspec.json.decode(part) for part in (command.tools, command.options))
    for index, message in enumerate(_messages_decoder.decode(command.messages)):
        for name, value in message.items():
            if _has(value, token):
                return f"messages[{index}].{name}"
    if _has(tools, token):
        return "tools"
    return "chat_template_kwargs" if _has(options, token) else "messages"


def _has(value: object, token: str) -> bool:
    """Whether a text in ``value`` has ``token``."""
    match value:
        case str():
            return token in value
        case list():
            return any(_has(part, token) for part in value)
        case dict():
            return any(_has(part, token) for pair in value.items() for part in pair)
        case _:
            return False


def _templates(model_dir: Path, config: dict[str, Any]) -> dict[str, str]:
    more = sorted((model_dir / "additional_chat_templates").glob("*.jinja"))
    files = {path.stem: path.read_text(encoding="utf-8") for path in more}
    single = model_dir / "chat_template.jinja"
    if single.is_file():
        files["default"] = single.read_text(encoding="utf-8")
    if files:
        return files
    match config.get("chat_template"):
        case str(template):
            return {"default": template}
        case list(named):
            return {template["name"]: template["template"] for template in named}
        case _:
            return {}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _decode(decoder: "msgspec.json.Decoder[Any]", field: str, body: bytes, expected: str) -> Any:
    if len(body) > _MAX_BYTES:
        raise BadRequest(field, f"at most {_MAX_BYTES} bytes")
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadRequest(field, f"{expected} ({error})") from None

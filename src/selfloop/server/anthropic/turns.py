"""Blocks of messages as the conversation that chat templates read."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from selfloop.server.anthropic import wire
from selfloop.server.anthropic.unserved import block, shown_type
from selfloop.server.shared.chat_content import Content, with_image, with_text
from selfloop.server.shared.decode import convert
from selfloop.server.shared.images import ImageReader, format_of, from_base64
from selfloop.server.shared.tools import template_call
from selfloop.types.errors import BadRequest
from selfloop.types.images import Image

_TOOL_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(slots=True)
class Turns:
    """The conversation as templates read it: text as one string or beside images, tools' answers as their own messages.

    ``images`` are those of its messages, in their order, and ``places`` the fields that each message came of.
    """

    reader: ImageReader
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    places: list[list[str]] = field(default_factory=list[list[str]])
    images: list[Image] = field(default_factory=list[Image])
    _called: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, message: dict[str, Any], where: str) -> None:
        self.messages.append(message)
        self.places.append([where])

    def take(self, message: wire.Message, where: str) -> None:
        if isinstance(message.content, str):
            text = message.content
            self._put(message.role, f"{where}.content", lambda content: with_text(content, text))
            return
        if not message.content:
            raise BadRequest(f"{where}.content", "a string, or at least one block")
        for i, given in enumerate(message.content):
            self._take_block(message.role, given, f"{where}.content[{i}]")

    def _take_block(self, role: str, given: dict[str, Any], where: str) -> None:
        match given.get("type"):
            case "text":
                text = block(given, wire.TextBlock, where).text
                self._put(role, where, lambda content: with_text(content, text))
            case "image" if role == "user":
                self._image(given, where)
                self._put(role, where, with_image)
            case "tool_use" if role == "assistant":
                self._use(block(given, wire.ToolUseBlock, where), where)
            case "tool_result" if role == "user":
                self._result(block(given, wire.ToolResultBlock, where), where)
            case _:
                own = {"assistant": "text or tool_use", "user": self.reader.kinds("text or tool_result", "image")}
                raise BadRequest(where, f"a block of type {own.get(role, 'text')}, got {shown_type(given)}")

    def _put(self, role: str, where: str, put: Callable[[Content | None], Content]) -> None:
        """A turn's texts and images are one message, and so are turns of one role that follow each other."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == role and "tool_calls" not in last:
            last["content"] = put(last["content"])
            self.places[-1].append(where)
        else:
            self.add({"role": role, "content": put(None)}, where)

    def _image(self, given: dict[str, Any], where: str) -> None:
        self.reader.check_seen(where, "a block of type text")
        source, field = block(given, wire.ImageBlock, where).source, f"{where}.source"
        if source.get("type") != "base64":
            expected = "base64, with the image's file as data: no URL is fetched, and no file is kept"
            raise BadRequest(f"{field}.type", f"{expected}; got {shown_type(source)}")
        file = convert(source, wire.Base64Source, field)
        format = format_of(file.media_type, f"{field}.media_type")
        self.images.append(self.reader.read(from_base64(file.data, f"{field}.data"), format, f"{field}.data"))

    def _use(self, block: wire.ToolUseBlock, where: str) -> None:
        if not _TOOL_ID.fullmatch(block.id) or block.id in self._called:
            raise BadRequest(f"{where}.id", "1 to 128 letters, digits, _ or -, and no other call's")
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.add({"role": "assistant", "content": ""}, where)
        else:
            self.places[-1].append(where)
        calls: list[object] = self.messages[-1].setdefault("tool_calls", [])
        calls.append(template_call(block.id, block.name, block.input))
        self._called[block.id] = block.name

    def _result(self, block: wire.ToolResultBlock, where: str) -> None:
        name = self._called.get(block.tool_use_id)
        if name is None:
            raise BadRequest(f"{where}.tool_use_id", "the id of a tool_use in a message before")
        content = self._result_content(block.content, f"{where}.content")
        if block.is_error:
            # Templates have no such mark; the model is to see it all the same.
            mark = "Error: "
            content = mark + content if isinstance(content, str) else [{"type": "text", "text": mark}, *content]
        self.add({"role": "tool", "content": content, "tool_call_id": block.tool_use_id, "name": name}, where)

    def _result_content(self, given: str | list[dict[str, Any]], where: str) -> Content:
        if isinstance(given, str):
            return given
        content: Content | None = None
        for i, part in enumerate(given):
            match part.get("type"):
                case "text":
                    content = with_text(content, block(part, wire.TextBlock, f"{where}[{i}]").text)
                case "image":
                    self._image(part, f"{where}[{i}]")
                    content = with_image(content)
                case _:
                    expected = f"a block of type {self.reader.kinds('text', 'image')}"
                    raise BadRequest(f"{where}[{i}]", f"{expected}, got {shown_type(part)}")
        return "" if content is None else content

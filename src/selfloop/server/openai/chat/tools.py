"""The tools of a chat request."""

from typing import Any

from selfloop.server.openai import wire
from selfloop.server.shared import tools
from selfloop.server.shared.tools import Call, Choice, Function, ToolUse
from selfloop.types.errors import BadRequest

_FORCING = "none, required or a function"


def tool_use(body: wire.ChatBody, template: str | None, answer: dict[str, Any] | None = None) -> ToolUse:
    """The checked tools of a request; ``answer`` is the schema of a text that is no call.

    Raises:
        BadRequest: a tool that is not a function, a choice of an unknown one, or a template without tools.
    """
    if not body.tools:
        for name, value in (("tool_choice", body.tool_choice), ("parallel_tool_calls", body.parallel_tool_calls)):
            if value not in (None, "none", "auto", False):
                raise BadRequest(name, "null without tools")
        return ToolUse()
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    return tools.tool_use(functions, _choice(body), template, answer)


def rendered(call: Call) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _choice(body: wire.ChatBody) -> Choice:
    at_most_one, field = body.parallel_tool_calls is False, "tool_choice.function.name"
    if isinstance(body.tool_choice, wire.NamedTool):
        return Choice("forced", body.tool_choice.function.name, at_most_one, field, _FORCING)
    kind = "forced" if body.tool_choice == "required" else body.tool_choice or "auto"
    return Choice(kind, None, at_most_one, field, _FORCING)


def _function(tool: wire.Tool, where: str) -> Function:
    if tool.type != "function" or tool.function is None or tool.custom is not None:
        raise BadRequest(where, "a tool of type function, with its function")
    function = tool.function
    return Function(function.name, function.parameters, bool(function.strict), f"{where}.function", "parameters")

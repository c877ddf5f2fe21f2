"""The natural base URLs of the clients of others: the server itself, and the server with ``/v1``.

OpenAI's, Anthropic's and vLLM's paths stand at the root of a server. Those that the management API does not have are
theirs here, too. Its ``GET /v1/models`` is another list than theirs, and is sent by clients with the same kind of key;
so that path is theirs where a header says that one of their libraries sends it.
"""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

_OPENAI, _ANTHROPIC = "/oai/api", "/anthropic/api"
_OPENAI_PATHS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
}
_ANTHROPIC_PATHS = {"/v1/messages", "/v1/messages/count_tokens"}
_MODELS = "/v1/models"
# Each request of Anthropic's libraries has the first; each of theirs and of OpenAI's, in any language, the second.
_ANTHROPIC_HEADER, _LIBRARY_HEADER = "anthropic-version", "x-stainless-lang"


class BaseUrls:
    """Gives ``app`` a request under the path that its dialect has here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (prefix := _prefix(scope["path"], Headers(scope=scope))):
            raw: bytes = scope.get("raw_path") or scope["path"].encode()
            scope = dict(scope) | {"path": prefix + scope["path"], "raw_path": prefix.encode() + raw}
        await self._app(scope, receive, send)


def _prefix(path: str, headers: Headers) -> str:
    if path in _OPENAI_PATHS:
        return _OPENAI
    if path in _ANTHROPIC_PATHS:
        return _ANTHROPIC
    if path == _MODELS or path.startswith(f"{_MODELS}/"):
        if _ANTHROPIC_HEADER in headers:
            return _ANTHROPIC
        if _LIBRARY_HEADER in headers:
            return _OPENAI
    return ""

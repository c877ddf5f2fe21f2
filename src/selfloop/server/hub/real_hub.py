"""The real hub behind ``/hf``: what is asked there and is not served here is handed on, so that data sets load."""

from collections.abc import AsyncGenerator, Iterable, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastapi import Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from selfloop.server.shared.auth import public_base
from selfloop.server.shared.body import read_body

# The library is loaded by the first request that is handed on, not by the start.
if TYPE_CHECKING:
    import httpx

DEFAULT_HUB_URL = "https://huggingface.co"
OFF = "off"

_PREFIX = "/hf"
_METHODS = ("GET", "HEAD", "POST")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TIMEOUT_S, _CONNECT_TIMEOUT_S = 60.0, 10.0
_MAX_CONNECTIONS = 32
# A key of ours is none of the hub's business; its own tokens begin so.
_HUB_TOKEN = "bearer hf_"
_SENT = {
    "accept",
    "accept-encoding",
    "content-encoding",
    "content-type",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "range",
    "user-agent",
}
# Of one connection, or of the other site: not of the answer.
_KEPT_BACK = {
    "alt-svc",
    "connection",
    "content-security-policy",
    "cross-origin-opener-policy",
    "date",
    "keep-alive",
    "proxy-authenticate",
    "server",
    "set-cookie",
    "strict-transport-security",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
}
_VIA = "1.1 selfloop"


class HubUnavailable(Exception):
    """The hub is not asked, or does not answer; ``status`` is what the client is to get."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class RealHub:
    """A hub at ``url``; None asks none, and everything that is not served here is refused with that reason."""

    def __init__(self, url: str | None) -> None:
        self._url = None if url is None else url.rstrip("/")
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def forward(self, request: Request) -> Response:
        """The hub's answer to the same request, as it comes.

        Raises:
            HubUnavailable: it is switched off, or cannot be reached, or is this server itself.
            TooLarge: the body.
        """
        import httpx

        path = _path_of(request)
        if self._url is None:
            why = "not served here, and this server asks no hub: start it with `selfloop serve --hub-url URL`"
            raise HubUnavailable(404, "RepoNotFound", f"{path}: {why}")
        if request.method not in _METHODS:
            raise HubUnavailable(405, "NotAllowed", f"{request.method}: only {', '.join(_METHODS)} are handed on")
        if _VIA in request.headers.get("via", ""):
            raise HubUnavailable(508, "Loop", f"--hub-url {self._url} leads back to this server")
        content = await read_body(request) if request.method == "POST" else None
        asked = self._client().build_request(
            request.method, self._url + path, headers=_sent(request.headers), content=content
        )
        try:
            answer = await self._client().send(asked, stream=True)
        except httpx.HTTPError as error:
            cause = str(error) or type(error).__name__
            why = f"the hub {self._url} cannot be reached ({cause}); `--hub-url {OFF}` stops asking it"
            raise HubUnavailable(504, "HubUnreachable", f"{path}: not served here, and {why}") from None
        headers = self._headers(answer, public_base(request))
        if request.method == "HEAD":
            await answer.aclose()
            return Response(status_code=answer.status_code, headers=headers)
        parts = _parts(answer)
        return StreamingResponse(parts, answer.status_code, headers, background=BackgroundTask(parts.aclose))

    def _client(self) -> "httpx.AsyncClient":
        import httpx

        if self._http is None:
            # A proxy of the environment is for servers elsewhere.
            is_near = urlsplit(self._url or "").hostname in _LOOPBACK
            limits = httpx.Limits(max_connections=_MAX_CONNECTIONS)
            timeout = httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
            # Cookies of one client are not sent for the next.
            no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
            self._http = httpx.AsyncClient(timeout=timeout, limits=limits, cookies=no_cookies, trust_env=not is_near)
        return self._http

    def _headers(self, answer: "httpx.Response", base: str) -> dict[str, str]:
        """Those of the answer; what leads on to the hub leads here, and to other sites as it is."""
        assert self._url is not None
        headers = {name: value for name, value in answer.headers.items() if name not in _KEPT_BACK}
        here = f"{base}{_PREFIX}"
        if "link" in headers:
            headers["link"] = headers["link"].replace(f"<{self._url}/", f"<{here}/")
        location = headers.get("location", "")
        if location.startswith(f"{self._url}/"):
            # Without a host: hub clients follow such a one while they only look at a file, and no other.
            headers["location"] = _PREFIX + location.removeprefix(self._url)
        elif location.startswith("/") and not location.startswith("//"):
            headers["location"] = _PREFIX + location
        return headers


def _path_of(request: Request) -> str:
    """What the client asks of the hub: the path below ``/hf`` with the query, encoded as it came."""
    raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    query: bytes = request.scope["query_string"]
    path = raw.decode("latin-1").partition("?")[0].removeprefix(_PREFIX)
    return f"{path}?{query.decode('latin-1')}" if query else path


def _sent(headers: Mapping[str, str]) -> dict[str, str]:
    sent = {name: value for name, value in headers.items() if name.lower() in _SENT or _is_own(name.lower())}
    token = headers.get("authorization", "")
    if token.lower().startswith(_HUB_TOKEN):
        sent["authorization"] = token
    # The client's own, or none: what comes is handed on as it is.
    sent.setdefault("accept-encoding", "identity")
    return sent | {"via": _VIA}


def _is_own(name: str) -> bool:
    """Whether a header is of the hub's own making, e.g. ``X-HF-Bill-To``."""
    return name.startswith(("x-hf-", "x-xet-"))


async def _parts(answer: "httpx.Response") -> AsyncGenerator[bytes]:
    try:
        async for part in answer.aiter_raw():
            yield part
    finally:
        await answer.aclose()


def hub_url(given: str | None, environment: Mapping[str, str]) -> str | None:
    """Which hub to ask: what was given, else the well-known one, unless the environment says that there is no network.

    Raises:
        ValueError: ``given`` is no address, in words.
    """
    if given is None:
        is_offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        return None if is_offline else DEFAULT_HUB_URL
    if given == OFF:
        return None
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"an address like {DEFAULT_HUB_URL}, or {OFF}; got {given!r}")
    return given


def served_ids(path: str) -> Iterable[str]:
    """The model ids that a path below ``/hf`` may be about, e.g. ``/api/models/org/name/paths-info/main``."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    elif parts[:1] == ["api"]:
        return ()
    return ("/".join(parts[:2]), parts[0])

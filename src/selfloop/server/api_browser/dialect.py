"""The place of the API's browser on the server. Its files are public; it calls routes with the key that is typed in."""

from selfloop.server.api_browser.routes import router
from selfloop.server.shared.dialect import Dialect, Mount

DIALECT = Dialect(
    name="api_browser",
    routers=(Mount(router, in_schema=False),),
    prefixes=("/docs/",),
    patterns=("/docs",),
    keyless=("/docs", "/docs/"),
)

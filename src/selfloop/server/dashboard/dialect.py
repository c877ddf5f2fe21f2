"""The page's place on the server. Its files are public; what it shows it asks for with the key of who signed in."""

from selfloop.server.dashboard.routes import router
from selfloop.server.shared.dialect import Dialect, Mount

DIALECT = Dialect(
    name="dashboard",
    bases="/ (in a browser)",
    routers=(Mount(router, in_schema=False),),
    prefixes=("/dashboard/",),
    patterns=("/",),
    keyless=("/", "/dashboard/"),
)

"""GraphQL, as far as the ``truss`` command line speaks it."""

from fastapi import Depends

from selfloop.server.graphql.route import ERRORS, router
from selfloop.server.shared.decode import json_is_text
from selfloop.server.shared.dialect import Dialect, Mount

DIALECT = Dialect(
    name="graphql",
    bases="/graphql/ (truss)",
    routers=(Mount(router, dependencies=(Depends(json_is_text),)),),
    # This path alone; the router takes it with a line break at its end, too.
    patterns=(r"/graphql/\n?",),
    errors=ERRORS,
    # Queries; its one mutation asks for a member itself.
    read_only=("POST /graphql/",),
)

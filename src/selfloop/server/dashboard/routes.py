"""The files of the page, from the package itself."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from selfloop.server.shared.static_files import IfNoneMatch, StaticFiles, page_policy

router = APIRouter()

_FILES = StaticFiles("selfloop.server.dashboard", page_policy())


@router.get("/", summary="The page, for browsers.")
async def page(request: Request, if_none_match: IfNoneMatch = None) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        # Whoever asks for something else is a client with a wrong address.
        raise HTTPException(404)
    return _FILES.page("index.html", if_none_match, {"Vary": "Accept"})


@router.get("/dashboard/{file}", summary="A file of the page.")
async def page_file(file: str, if_none_match: IfNoneMatch = None) -> Response:
    return _FILES.file(file, if_none_match)

"""The files of the API's browser, from the package itself: nothing comes from another host."""

from fastapi import APIRouter
from fastapi.responses import Response

from selfloop.server.shared.static_files import IfNoneMatch, StaticFiles, page_policy

router = APIRouter()

# Its style sheet has its icons in it.
_FILES = StaticFiles("selfloop.server.api_browser", page_policy(images="'self' data:"))


@router.get("/docs", summary="The API's browser.")
async def docs(if_none_match: IfNoneMatch = None) -> Response:
    return _FILES.page("docs.html", if_none_match)


@router.get("/docs/{file}", summary="A file of the API's browser.")
async def docs_file(file: str, if_none_match: IfNoneMatch = None) -> Response:
    return _FILES.file(file, if_none_match)

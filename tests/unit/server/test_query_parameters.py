"""A query string against what a route declares."""

import pytest

from selfloop.server.shared.query_parameters import check
from selfloop.types.errors import BadRequest

DECLARED = {"page_size": False, "page_token": False, "includes": True}


@pytest.mark.parametrize(
    "raw",
    [b"", b"&", b"page_size=1", b"page_size=1&page_token=a%20b+c", b"includes=a&includes=b", b"page_size"],
)
def test_what_is_declared_passes(raw: bytes):
    check(raw, DECLARED)


@pytest.mark.parametrize(
    ("raw", "field", "expected"),
    [
        (b"pagesize=1", "pagesize", "did you mean page_size?"),
        (b"nonsense=1", "nonsense", "this route takes includes, page_size, page_token"),
        (b"page_size=1&page_size=1", "page_size", "several times"),
        (b"page_size=1&%70age_size=2", "page_size", "several times"),
        (b"page_size[]=1", "page_size[]", "did you mean page_size?"),
        (b"page_size=%f", "page_size", "percent-encoded"),
        (b"page_size=%zz", "page_size", "percent-encoded"),
        (b"page_token=%ff", "page_token", "UTF-8"),
        (b"page_token=%ed%a0%80", "page_token", "UTF-8"),
        (b"page_token=a%00", "page_token", "NUL"),
        (b"page_size%00=1", "page_size\0", "unknown"),
        (b"=1", "query", "names"),
        (b"page_size=1;page_token=2&;", ";", "unknown"),
    ],
)
def test_anything_else_is_refused_by_name(raw: bytes, field: str, expected: str):
    with pytest.raises(BadRequest) as refused:
        check(raw, DECLARED)
    assert refused.value.field == field
    assert expected in refused.value.expected


def test_a_route_without_parameters_says_so():
    with pytest.raises(BadRequest, match="nonsense: unknown query parameter; this route takes none"):
        check(b"nonsense=1", {})

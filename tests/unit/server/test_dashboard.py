"""The page at ``/``: whom it is given, what it may do, and what its files are."""

import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from asgi import app_for_documents, ask

STATIC = Path(str(files("selfloop.server.dashboard") / "static"))
VENDOR = STATIC / "vendor"
SERVED = {path.name: path for folder in (STATIC, VENDOR) for path in folder.iterdir() if path.suffix}
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
MAX_BYTES = 300_000


async def test_a_browser_gets_the_page_with_a_strict_policy():
    answer = await ask(app_for_documents(), "GET", "/", BROWSER)
    assert answer.status == 200
    assert answer.body == (STATIC / "index.html").read_bytes()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("accept", ["*/*", "application/json"])
async def test_a_client_with_a_wrong_address_is_told_so_in_json(accept: str):
    answer = await ask(app_for_documents(), "GET", "/", {"accept": accept})
    assert answer.status == 404
    assert "/openapi.json" in json.loads(answer.body)["message"]


async def test_files_are_given_with_their_type_and_once():
    app = app_for_documents()
    for name, path in SERVED.items():
        answer = await ask(app, "GET", f"/dashboard/{name}")
        assert (answer.status, answer.body) == (200, path.read_bytes()), name
        kind = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}
        assert answer.headers["content-type"].startswith(kind[name.rpartition(".")[2]]), name
        again = await ask(app, "GET", f"/dashboard/{name}", {"if-none-match": answer.headers["etag"]})
        assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize("name", ["NOTICE", "nothing.js", "..%2froutes.py", "vendor"])
async def test_nothing_else_is_given(name: str):
    answer = await ask(app_for_documents(), "GET", f"/dashboard/{name}")
    assert answer.status == 404
    assert "not found" in json.loads(answer.body)["message"]


def test_every_file_that_is_named_is_there():
    page = (STATIC / "index.html").read_text()
    named = set(re.findall(r'(?:src|href)="dashboard/([^"]+)"', page))
    for script in STATIC.glob("*.js"):
        named |= set(re.findall(r'from "\./([^"]+)"', script.read_text()))
    assert named == SERVED.keys() - {"index.html"}


def test_the_page_has_no_script_or_style_of_its_own_and_names_no_other_host():
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]* src=)", page)
    for path in STATIC.iterdir():
        if path.suffix in (".html", ".js", ".css"):
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text()), path.name


def test_it_is_small():
    assert sum(path.stat().st_size for path in SERVED.values()) < MAX_BYTES


def test_what_is_of_others_is_as_they_published_it():
    notice = (VENDOR / "NOTICE").read_text()
    digests = re.findall(r"^(\S+\.\w+) .*?\n(?:.*\n)*?\s+sha256 ([0-9a-f]{64})$", notice, re.MULTILINE)
    scripts = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir() if path.suffix}
    assert dict(digests) == scripts
    for licence in re.findall(r"LICENSE-\w+", notice):
        assert (VENDOR / licence).is_file()

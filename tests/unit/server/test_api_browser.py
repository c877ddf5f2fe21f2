"""The API's browser at ``/docs``: what it may do, and what its files are."""

import hashlib
import re
from importlib.resources import files
from pathlib import Path

from asgi import app_for_documents, ask

STATIC = Path(str(files("selfloop.server.api_browser") / "static"))
VENDOR = STATIC / "vendor"


async def test_it_is_given_with_a_strict_policy():
    answer = await ask(app_for_documents(), "GET", "/docs")
    assert (answer.status, answer.body) == (200, (STATIC / "docs.html").read_bytes())
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert policy["default-src"] == "'none'"
    assert policy["img-src"] == "'self' data:"


async def test_every_file_that_it_names_is_given():
    app = app_for_documents()
    named = re.findall(r'(?:src|href)="(docs/[^"]+|dashboard/[^"]+)"', (STATIC / "docs.html").read_text())
    assert len(named) == 4
    for name in named:
        assert (await ask(app, "GET", f"/{name}")).status == 200, name
    assert (await ask(app, "GET", "/docs/NOTICE")).status == 404


def test_what_is_of_others_is_as_they_published_it():
    notice = (VENDOR / "NOTICE").read_text()
    digests = re.findall(r"^(\S+\.\w+) .*\n\s+sha256 ([0-9a-f]{64})$", notice, re.MULTILINE)
    published = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir() if path.suffix}
    assert dict(digests) == published
    assert (VENDOR / "LICENSE-swagger-ui").is_file()

"""``make newest``: each client's pinned version, and suites that exist."""

import importlib.util
import sys

import pytest

from gateway import REPO

_spec = importlib.util.spec_from_file_location("newest", REPO / ".ci" / "newest.py")
assert _spec is not None
assert _spec.loader is not None
newest = importlib.util.module_from_spec(_spec)
sys.modules["newest"] = newest
_spec.loader.exec_module(newest)


@pytest.mark.parametrize("client", newest.CLIENTS, ids=lambda client: client.package)
def test_each_client_is_pinned_and_has_suites(client: object):
    assert newest.pinned(client)[0].isdigit()
    for name in client.suites:  # type: ignore[attr-defined]
        assert (REPO / "tests" / "clients" / f"{name}.py").exists()


def test_an_unknown_client_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["newest", "another"])
    with pytest.raises(SystemExit, match="no such client: another; known: baseten-loops"):
        newest.main()

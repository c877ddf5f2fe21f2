"""Links: for one file, for an hour, by one secret."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfloop.control.data_dir.signed_urls import LINK_LIFE_S, SECRET_FILE, SignedUrls, rotate
from selfloop.types.errors import Denied


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("links")


def test_a_link_is_good_for_an_hour(folder: Path, monkeypatch: pytest.MonkeyPatch):
    links = SignedUrls(folder)
    expires, signature = links.sign("checkpoint", "id", "name")
    links.check("checkpoint", "id", "name", expires, signature)
    assert expires <= time.time() + LINK_LIFE_S
    monkeypatch.setattr(time, "time", lambda: expires + 1)
    with pytest.raises(Denied, match="expired"):
        links.check("checkpoint", "id", "name", expires, signature)


TEXT = st.text(max_size=8) | st.sampled_from(["a", "a\nb", "../a", "a\0"])
LINK = st.tuples(st.sampled_from(["checkpoint", "debug"]), TEXT, TEXT, st.integers(0, 2**40))


@given(LINK, LINK)
def test_no_two_links_share_a_signature(folder: Path, one: tuple, other: tuple):
    links = SignedUrls(folder)
    assert (links._signature(*one) == links._signature(*other)) == (one == other)


@given(LINK, st.text(max_size=70))
def test_no_text_is_a_signature_but_the_one(folder: Path, link: tuple, text: str):
    links = SignedUrls(folder)
    if text != links._signature(*link):
        with pytest.raises(Denied, match="not valid"):
            links.check(*link, text)


def test_a_rotated_secret_ends_all_links_also_in_a_running_server(folder: Path):
    running = SignedUrls(folder)
    old = running.sign("checkpoint", "id", "name")
    rotate(folder)
    with pytest.raises(Denied, match="not valid"):
        running.check("checkpoint", "id", "name", *old)
    running.check("checkpoint", "id", "name", *SignedUrls(folder).sign("checkpoint", "id", "name"))


def test_the_secret_is_for_its_owner_alone_and_stays(tmp_path: Path):
    link = SignedUrls(tmp_path).sign("debug", "id", "name")
    assert (tmp_path / SECRET_FILE).stat().st_mode & 0o777 == 0o600
    assert len((tmp_path / SECRET_FILE).read_bytes()) == 32
    SignedUrls(tmp_path).check("debug", "id", "name", *link)
    assert [file.name for file in tmp_path.iterdir()] == [SECRET_FILE]

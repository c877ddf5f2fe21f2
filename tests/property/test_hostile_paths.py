"""No name, address or key that comes from outside leads to a file outside of where it belongs."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfloop.cli.checkpoints import _inside
from selfloop.cli.remote import CommandFailed
from selfloop.control.data_dir.signed_urls import SignedUrls
from selfloop.control.observe.archive import Archives
from selfloop.control.queue.operations import checked_operation_id
from selfloop.control.resources.catalogue import _NAME
from selfloop.server.shared import tinker_paths
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.types.errors import BadRequest, NotFound, SelfloopError
from selfloop.types.model_folder import check_links, is_own_file
from selfloop.types.status import CheckpointTarget
from selfloop.types.uris import is_checkpoint_name, parse_checkpoint_uri

_PIECES = ["..", ".", "/", "\\", "a", "..\\", "C:", "\0", "%2e%2e", "%2f", "~", "-", " ", "\n", "x.y"]
PIECE = st.sampled_from([*_PIECES, "\u2215", "\u2025", "\uff0e"])
HOSTILE = st.lists(PIECE | st.text(max_size=3), max_size=6).map("".join)
ROOT = Path("/srv/data")


def stays(name: str) -> bool:
    """Whether the name is one harmless segment of a path, on any system."""
    is_inside = Path(os.path.normpath(ROOT / name)).parent == ROOT
    return is_inside and name.isascii() and name.isprintable() and not set(name) & set('/\\:\0~ "')


@settings(max_examples=200)
@given(HOSTILE)
def test_names_that_are_taken_are_single_segments(name: str):
    if is_checkpoint_name(name):
        assert stays(name)
    if _NAME.fullmatch(name):
        assert all(stays(part) for part in name.split("/"))
        assert stays(name.replace("/", "--"))
    try:
        checked_operation_id(name)
    except BadRequest:
        return
    assert stays(name)


@settings(max_examples=200)
@given(HOSTILE, HOSTILE, st.sampled_from(["weights", "sampler_weights", "external_weights", ".."]))
def test_addresses_that_are_taken_have_single_segments(run: str, name: str, folder: str):
    for parse, address in (
        (parse_checkpoint_uri, f"bt://loops:{run}/{folder}/{name}"),
        (tinker_paths.any_path, f"tinker://{run}/{folder}/{name}"),
        (tinker_paths.any_path, name),
        (parse_checkpoint_uri, run),
    ):
        try:
            uri = parse(address, "path")
        except SelfloopError:
            continue
        assert stays(uri.name), address
        assert stays(uri.run_id), address
        assert uri.target in CheckpointTarget
    for identify in (tinker_paths.run_id, tinker_paths.sampler_id):
        with contextlib.suppress(NotFound):
            assert stays(identify(run))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory beside a secret, with a link in it that leads there."""
    home = tmp_path_factory.mktemp("home")
    (home / "secret").write_text("secret")
    data = home / "data"
    (data / "debug" / "a-1").mkdir(parents=True)
    (data / "debug" / "a-1" / "logs.jsonl").write_text("log")
    (data / "link").symlink_to(home)
    (data / "api_key").write_text("secret")
    return data


@settings(max_examples=200)
@given(HOSTILE | st.sampled_from(["link/secret", "../secret", "/etc/passwd", "a/../../secret", "link"]))
def test_no_key_of_a_blob_leads_out(house: Path, key: str):
    try:
        path = LocalBlobs(house).path(key)
    except ValueError:
        return
    assert path.resolve().is_relative_to(house.resolve())


@settings(max_examples=200)
@given(HOSTILE | st.just(".."), HOSTILE | st.sampled_from(["../../api_key", "api_key", "/etc/passwd"]))
def test_even_a_link_of_ours_opens_only_a_file_of_the_archive(house: Path, id: str, name: str):
    """With the right signature of a name that we would never sign."""
    links = SignedUrls(house)
    signed = links.sign("debug", id, name)
    try:
        path = Archives(house, links).open_signed_url(id, name, signed.expires, signed.signature)
    except (NotFound, ValueError):
        return
    assert path.resolve().is_relative_to((house / "debug").resolve())


@settings(max_examples=200)
@given(HOSTILE | st.sampled_from(["link/secret", "../secret", "/etc/passwd"]))
def test_a_download_writes_into_its_folder_only(house: Path, name: str):
    """Whatever a hostile server calls its files."""
    try:
        target = _inside(house, name)
    except (CommandFailed, ValueError):
        return
    assert target.is_relative_to(house.resolve())


def test_a_folder_of_somebody_elses_lends_no_file_of_ours(tmp_path: Path):
    """A link out of it is no file of the folder; one within it, or within a cache of the hub, is."""
    (tmp_path / "secret.json").write_text("{}")
    folder = tmp_path / "models--a--b" / "snapshots" / "1"
    blobs = tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (folder / "own.json").write_text("{}")
    (folder / "within.json").symlink_to("own.json")
    (folder / "cached.json").symlink_to("../../blobs/1")
    check_links(folder, "FOLDER")
    for target in ("../../../secret.json", str(tmp_path / "secret.json"), "../../blobs/../../secret.json"):
        link = folder / "out.json"
        link.symlink_to(target)
        assert link.is_file()
        assert not is_own_file(folder, "out.json")
        with pytest.raises(BadRequest, match=r"out\.json"):
            check_links(folder, "FOLDER")
        link.unlink()
    assert all(is_own_file(folder, name) for name in ("own.json", "within.json", "cached.json"))
    assert not is_own_file(folder, "../../../secret.json")

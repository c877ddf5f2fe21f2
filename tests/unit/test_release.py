"""``make release``: versions, the changelog, and what is no release."""

import importlib.util
import sys

import pytest

import selfloop
from gateway import REPO

_spec = importlib.util.spec_from_file_location("release", REPO / ".ci" / "release.py")
assert _spec is not None
assert _spec.loader is not None
release = importlib.util.module_from_spec(_spec)
sys.modules["release"] = release
_spec.loader.exec_module(release)

CHANGELOG = (
    "# Changelog\n\n## [0.2.0] - unreleased\n\n### Added\n\n- It flies.\n\n## [0.1.0] - 2026-01-02\n\n- It walks.\n"
)


def test_the_section_of_the_version_gets_the_date():
    dated = release.with_date(CHANGELOG, "0.2.0", "2026-03-04")
    assert "## [0.2.0] - 2026-03-04\n" in dated
    assert dated.replace("2026-03-04", "unreleased") == CHANGELOG


@pytest.mark.parametrize(
    ("changelog", "said"),
    [(CHANGELOG.replace("[0.2.0]", "[0.3.0]"), "no section"), (CHANGELOG.replace("- It flies.", ""), "says nothing")],
)
def test_a_version_that_the_changelog_does_not_describe_is_refused(changelog: str, said: str):
    with pytest.raises(release.Refused, match=said):
        release.with_date(changelog, "0.2.0", "2026-03-04")


def test_both_files_that_have_a_version_are_set():
    for path in (REPO / "pyproject.toml", REPO / "src" / "selfloop" / "__init__.py"):
        text = path.read_text()
        assert f'"{selfloop.__version__}"' in text
        changed = release.with_version(text, "9.8.7")
        assert changed.replace("9.8.7", selfloop.__version__, 1) == text


@pytest.mark.parametrize("version", ["", "1.2", "v1.2.3", "1.2.3rc1", "1.2.3.4"])
def test_a_version_is_three_numbers(version: str):
    with pytest.raises(release.Refused, match="three numbers"):
        release.numbers(version)


def test_the_changelog_has_the_section_of_this_version():
    assert f"\n## [{selfloop.__version__}] - " in (REPO / "CHANGELOG.md").read_text()

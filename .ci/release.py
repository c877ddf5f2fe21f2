"""Make a release of what is on main: ``make release VERSION=0.2.0``.

Sets the version and the date in the changelog, keeps a data directory of this version for every later one to start
(``tests/data_directories``), builds the wheel, installs it in an environment of its own, and commits and tags the
result. Nothing is pushed: look at the commit, then ``git push --follow-tags``.
"""

import datetime
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPO = Path(__file__).parents[1]
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")


class Refused(Exception):
    """In words for whoever makes the release."""


def numbers(version: str) -> tuple[int, ...]:
    """``1.2.3`` as numbers. Raises :class:`Refused`."""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise Refused(f"VERSION must be three numbers, such as 0.2.0; it is {version!r}")
    return tuple(map(int, match.groups()))


def with_version(text: str, version: str) -> str:
    """A file with its line ``version = "..."`` or ``__version__ = "..."`` set. Raises :class:`Refused`."""
    changed, count = re.subn(
        r'^((?:__)?version(?:__)? = )"[^"]*"', rf'\1"{version}"', text, count=1, flags=re.MULTILINE
    )
    if count != 1:
        raise Refused("no line with a version")
    return changed


def with_date(changelog: str, version: str, date: str) -> str:
    """The changelog with the date of its section of ``version``. Raises :class:`Refused`: there is none to release."""
    heading = f"## [{version}] - unreleased"
    start = changelog.find(heading)
    if start < 0:
        raise Refused(f"CHANGELOG.md has no section {heading!r}")
    section = changelog[start + len(heading) :].split("\n## [")[0]
    if not any(line.startswith("- ") for line in section.splitlines()):
        raise Refused(f"the changelog says nothing of {version}")
    return changelog.replace(heading, f"## [{version}] - {date}", 1)


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout.strip()


def check(version: str) -> None:
    """Raises :class:`Refused` where a release cannot be made from here."""
    numbers(version)
    if run("git", "status", "--porcelain"):
        raise Refused("there are changes that are not committed")
    if run("git", "branch", "--show-current") != "main":
        raise Refused("releases are made on main")
    tags = run("git", "tag", "--list", "v*").split()
    if (newer := [tag for tag in tags if numbers(tag[1:]) >= numbers(version)]) != []:
        raise Refused(f"{', '.join(newer)} exists")


def build(version: str) -> Path:
    """The wheel, in ``dist/``; it says its version where it is installed alone."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", REPO / "dist", ".")
    wheel = REPO / "dist" / f"selfloop-{version}-py3-none-any.whl"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q", wheel)
        shown = run(Path(folder) / "bin" / "selfloop", "--version")
    if version not in shown:
        raise Refused(f"the wheel says that it is {shown!r}")
    return wheel


def main() -> None:
    """Make the release that the one argument names."""
    version = sys.argv[1] if len(sys.argv) == 2 else ""
    try:
        check(version)
        for path in (REPO / "pyproject.toml", REPO / "src" / "selfloop" / "__init__.py"):
            path.write_text(with_version(path.read_text(), version))
        changelog = REPO / "CHANGELOG.md"
        changelog.write_text(with_date(changelog.read_text(), version, datetime.date.today().isoformat()))
        archive = REPO / "tests" / "data_directories" / f"{version}.tar.xz"
        if not archive.exists():
            run(sys.executable, REPO / "tests" / "data_directories" / "make.py", version)
        wheel = build(version)
        run("git", "add", "pyproject.toml", "src/selfloop/__init__.py", "CHANGELOG.md", archive)
        run("git", "commit", "-m", f"Release {version}")
        run("git", "tag", "-a", f"v{version}", "-m", f"Selfloop {version}")
    except Refused as refused:
        sys.exit(f"no release: {refused}")
    print(f"{wheel}\ncommitted and tagged v{version}; look at it, then: git push --follow-tags")


if __name__ == "__main__":
    main()

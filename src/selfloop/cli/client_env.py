"""The official client's own environment: it needs a newer Python than the server does.

python -m selfloop.cli.client_env DIRECTORY
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CLONE = Path(__file__).parents[3]
_PACKAGED = Path(__file__).parent / "data"
CLIENT_PACKAGE = "baseten-loops"
CLIENT_VERSION = "0.32.0"

NO_PYTHON = (
    "The official client needs Python 3.12 or newer, and none was found on this machine. "
    "Install one (`uv python install 3.12`, `pyenv install 3.12` or your system's python3.12) and try again. "
    "The server itself is fine with this Python."
)

_HAS_CLIENT = f"""
from importlib.metadata import version
version("jinja2")
assert version({CLIENT_PACKAGE!r}) == {CLIENT_VERSION!r}
"""
_IS_NEW_ENOUGH = "import sys, venv, ensurepip; assert sys.version_info >= (3, 12)"


class ClientEnvironmentFailed(Exception):
    """The environment cannot be made; the text says why and what to do."""


def carried(name: str) -> Path:
    """The file ``name`` of the repository: the wheel's copy of it (``setup.py`` lists them), or that of the clone."""
    packaged = _PACKAGED / name
    return packaged if packaged.is_file() else CLONE / name


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def has_client(python: str | Path) -> bool:
    """Whether ``python`` runs and has the client in the version we know."""
    return _succeeds(python, _HAS_CLIENT)


def has_client_here() -> bool:
    """Whether this very interpreter can run the client."""
    if sys.version_info < (3, 12):
        return False
    try:
        importlib.metadata.version("jinja2")
        return importlib.metadata.version(CLIENT_PACKAGE) == CLIENT_VERSION
    except importlib.metadata.PackageNotFoundError:
        return False


def find_client_python(*environments: Path) -> str | None:
    """A Python that has the client: this one, the clone's ``.venv-client``, or one of ``environments``."""
    if has_client_here():
        return sys.executable
    candidates = (str(python_of(environment)) for environment in (CLONE / ".venv-client", *environments))
    return next((python for python in candidates if has_client(python)), None)


def newer_pythons() -> Iterator[str]:
    """Interpreters of 3.12 or newer, ready to make environments; the oldest such version first."""
    candidates = [sys.executable]
    candidates += [found for v in ("3.12", "3.13", "3.14") if (found := shutil.which(f"python{v}"))]
    candidates += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python"))]
    yield from (python for python in candidates if _succeeds(python, _IS_NEW_ENOUGH))
    uv = shutil.which("uv")
    if uv is not None:
        found = subprocess.run([uv, "python", "find", ">=3.12"], capture_output=True, text=True, check=False)
        if found.returncode == 0 and _succeeds(found.stdout.strip(), _IS_NEW_ENOUGH):
            yield found.stdout.strip()


def make_environment(environment: Path, base: str) -> None:
    """Make ``environment`` from the interpreter ``base``, or bring it to the pinned requirements.

    Raises:
        ClientEnvironmentFailed: a command failed; the text has its last words.
    """
    python = str(python_of(environment))
    if not _succeeds(python, _IS_NEW_ENOUGH):
        _check_call([base, "-m", "venv", "--clear", str(environment)])
    _check_call([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *_requirements()])


def _requirements() -> list[str]:
    return ["-r", str(carried("requirements/client.txt"))]


def _succeeds(python: str | Path, code: str) -> bool:
    """Whether ``python`` exists and runs ``code``. A shim of a version manager may exist and yet not run."""
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _check_call(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise ClientEnvironmentFailed(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make an environment with the official client.")
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    base = next(newer_pythons(), None)
    if base is None:
        # Set-up goes on: only what runs the official client is missing.
        print(f"{NO_PYTHON}\nUntil then `make demo`, `make bench` and the tests of the official client do not run.")
        return
    print(f"Installing {CLIENT_PACKAGE} {CLIENT_VERSION} into {directory} with {base}", flush=True)
    try:
        make_environment(directory, base)
    except ClientEnvironmentFailed as failure:
        sys.exit(str(failure))


if __name__ == "__main__":
    main()

"""Run the suites of the official clients against the newest version of each that is published; ``make newest``.

Each gets an environment of its own below ``build/newest``, beside the pinned ones, which stay as they are. A table at
the end has both versions of each client and what came of its suite. Exit status 1 where a test failed or none ran.
Arguments name clients; without any it is all of them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from selfloop.cli.client_env import newer_pythons

REPO = Path(__file__).parents[1]
FOLDER = REPO / "build" / "newest"
REQUIREMENTS = REPO / "requirements"


@dataclass(frozen=True)
class Client:
    """A client, the file that pins it, how its environment is made, and the suites that use it.

    Args:
        make: makes the environment in a folder and gives the variables that lead the suites to it.
    """

    package: str
    pinned_in: str
    make: Callable[[Path], dict[str, str]]
    suites: tuple[str, ...]


@dataclass
class Result:
    newest: str = "-"
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""


def venv(folder: Path, base: str = sys.executable) -> str:
    """A fresh environment's Python."""
    run([base, "-m", "venv", "--clear", str(folder)])
    return str(folder / "bin" / "python")


def install(python: str, *arguments: str) -> None:
    run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments])


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}")


def make_loops(folder: Path) -> dict[str, str]:
    base = next(newer_pythons(), None)
    if base is None:
        raise RuntimeError("baseten-loops needs Python 3.12 or newer, and there is none here")
    python = venv(folder, base)
    install(python, "--upgrade", "baseten-loops", "baseten-loops-tinker", "jinja2")
    return {"SELFLOOP_CLIENT_PYTHON": python}


def make_baseten(folder: Path) -> dict[str, str]:
    """The suite imports it, so it goes before the pinned one."""
    shutil.rmtree(folder, ignore_errors=True)
    install(sys.executable, "--no-deps", "--upgrade", "--target", str(folder), "baseten")
    return {"PYTHONPATH": str(folder)}


def make_tinker(folder: Path) -> dict[str, str]:
    python = venv(folder)
    install(python, "--upgrade", "tinker", "zstandard", "pyrage")
    return {"SELFLOOP_TINKER_PYTHON": python}


def make_cookbook(folder: Path) -> dict[str, str]:
    """As the pinned one: its own packages, then those of the environment that tests, which has PyTorch."""
    python = venv(folder)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(own.stdout.strip()) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install(python, "--no-deps", "-r", str(REQUIREMENTS / "cookbook.txt"))
    install(python, "--no-deps", "--upgrade", "tinker", "tinker-cookbook")
    return {"SELFLOOP_COOKBOOK_PYTHON": python}


def make_truss(folder: Path) -> dict[str, str]:
    python = venv(folder)
    install(python, "-r", str(REQUIREMENTS / "truss.txt"))
    install(python, "--no-deps", "--upgrade", "truss")
    return {"SELFLOOP_TRUSS": str(folder / "bin" / "truss")}


LOOPS_SUITES = ("test_loops_client", "test_loops_serverless", "test_loops_imported", "test_loops_tinker_shim")
CLIENTS = [
    Client("baseten-loops", "client.txt", make_loops, LOOPS_SUITES),
    Client("baseten", "dev.txt", make_baseten, ("test_baseten_client", "test_baseten_observations")),
    Client("tinker", "tinker.txt", make_tinker, ("test_tinker_client", "test_tinker_cli", "test_tinker_weights")),
    Client("tinker-cookbook", "cookbook.txt", make_cookbook, ("test_tinker_cookbook",)),
    Client("truss", "truss.txt", make_truss, ("test_truss",)),
]


def pinned(client: Client) -> str:
    """The version that our own tests run against."""
    lists = [(REQUIREMENTS / client.pinned_in).read_text(), (REPO / "Makefile").read_text()]
    words = " ".join(lists).replace("'", " ").split()
    return next(word.partition("==")[2] for word in words if word.startswith(f"{client.package}=="))


def newest(client: Client, folder: Path) -> str:
    """The version that was installed there."""
    name = client.package.replace("-", "_")
    found = next(folder.rglob(f"{name}-*.dist-info"))
    return found.name.removeprefix(f"{name}-").removesuffix(".dist-info")


def test(client: Client) -> Result:
    folder, result = FOLDER / client.package, Result()
    report = FOLDER / f"{client.package}.xml"
    report.unlink(missing_ok=True)
    try:
        variables = client.make(folder)
        result.newest = newest(client, folder)
    except RuntimeError as error:
        result.note = "cannot be installed"
        print(error, flush=True)
        return result
    suites = [f"tests/clients/{name}.py" for name in client.suites]
    print(f"-- {client.package} {result.newest}: {' '.join(suites)}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "--dist", "loadfile", f"--junitxml={report}", *suites]
    subprocess.run(command, cwd=REPO, env=os.environ | variables, check=False)
    if not report.exists():
        result.note = "its suite did not run"
        return result
    counted = next(ElementTree.parse(report).iter("testsuite")).attrib
    result.failed = int(counted["failures"]) + int(counted["errors"])
    result.skipped = int(counted["skipped"])
    result.passed = int(counted["tests"]) - result.failed - result.skipped
    return result


def main() -> None:
    asked = sys.argv[1:]
    if unknown := set(asked) - {client.package for client in CLIENTS}:
        sys.exit(f"no such client: {', '.join(sorted(unknown))}; known: {', '.join(c.package for c in CLIENTS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = {client: test(client) for client in CLIENTS if not asked or client.package in asked}
    row = "{:16} {:>9} {:>9} {:>7} {:>7} {:>8}  {}".format
    print("\n" + row("client", "pinned", "newest", "passed", "failed", "skipped", ""))
    for client, r in results.items():
        print(row(client.package, pinned(client), r.newest, r.passed, r.failed, r.skipped, r.note).rstrip())
    sys.exit(any(r.failed or not r.passed for r in results.values()))


if __name__ == "__main__":
    main()

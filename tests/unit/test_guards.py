"""The house rules that a reader would otherwise have to remember."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "selfloop"
MAX_LINES = 700
MAX_BROAD_HANDLERS = 7

sources = pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository, which imports the package from its source."""
    env = {**os.environ, "PYTHONPATH": str(SRC.parent), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_import_doors():
    done = run_python("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()")
    assert done.returncode == 0, done.stdout + done.stderr


GATEWAY = """
import asyncio, os, signal, socket, sys, tempfile, threading, urllib.request
from pathlib import Path

HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "gguf", "selfloop.engine"}
import psutil
import selfloop.cli.doctor
import selfloop.cli.main
from selfloop.server.serve import run_gateway
from selfloop.types.settings import Settings

assert not HEAVY & sys.modules.keys(), ("imported", HEAVY & sys.modules.keys())

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]

def ask():
    for path in ("/healthz", "/v1/teams", "/v1/loops/capabilities", "/openapi.json"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": "Bearer key"})
        assert urllib.request.urlopen(request).status == 200
    assert not HEAVY & sys.modules.keys(), ("serving", HEAVY & sys.modules.keys())
    print("rss_mb", psutil.Process().memory_info().rss // 2**20, flush=True)
    print("light", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

with tempfile.TemporaryDirectory() as folder:
    settings = Settings("127.0.0.1", port, Path(folder), "key")
    asyncio.run(run_gateway(settings, lambda made: threading.Thread(target=ask).start()))
"""


def test_the_gateway_is_light():
    """No numerics library gets in by import or by serving, and the process stays small."""
    done = run_python("-c", GATEWAY)
    assert "light" in done.stdout, done.stdout + done.stderr
    match = re.search(r"rss_mb (\d+)", done.stdout)
    assert match is not None
    assert int(match[1]) < 150


def test_test_files_have_names_of_their_own():
    """They are imported by name, so two of one name cannot be collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@sources
def test_files_stay_small(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@sources
def test_nothing_is_left_for_later(path: Path):
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8"))


def broad_handlers(path: Path) -> Iterator[str]:
    """Lines that catch everything and go on. One that ends in a ``raise`` cleans up, or names a library's error."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            catches_all = _is_broad(node.type) and not _reraises(node)
        else:
            is_suppress = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
            catches_all = is_suppress and any(map(_is_broad, node.args))
        if catches_all:
            yield lines[node.lineno - 1]


def _reraises(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and (last.exc is None or isinstance(last.cause, ast.Name))


def _is_broad(kind: ast.expr | None) -> bool:
    return kind is None or bool({"Exception", "BaseException"} & set(re.findall(r"\w+", ast.unparse(kind))))


def test_who_catches_everything_says_why():
    found = [(path, line) for path in SRC.rglob("*.py") for line in broad_handlers(path)]
    assert len(found) <= MAX_BROAD_HANDLERS, found
    for path, line in found:
        assert re.search(r"#\s*(?!noqa)\w+", line), f"{path}: {line.strip()}: no reason given"


def test_the_exported_surface():
    done = run_python("-c", "import selfloop; print([n for n in vars(selfloop) if not n.startswith('__')])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_one_version():
    import selfloop

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert selfloop.__version__ == project["version"]
    assert f"[{selfloop.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

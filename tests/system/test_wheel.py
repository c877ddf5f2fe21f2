"""The wheel alone, without the clone: what it carries is enough for a server and its page, and has the demo's files.

The fresh environment borrows the packages that the wheel needs from the one that runs the tests: no second PyTorch.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from gateway import until
from stores import free_port

REPO = Path(__file__).parents[2]
FOLDERS = ("src", "examples", "requirements")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment in which the wheel of this tree is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    clone, environment = folder / "clone", folder / "env"
    clone.mkdir()
    for name in (*FOLDERS, *FILES):
        # A copy: what earlier builds left behind does not get into the wheel, nor does this one leave anything.
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, clone / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            shutil.copy(REPO / name, clone / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(clone))
    shutil.rmtree(clone)
    venv.create(environment)
    python = environment / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel))
    # Only these folders and no .pth in them, by which a clone is installed: selfloop is the wheel's.
    site_packages = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site_packages) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return environment / "bin"


def run(*command: str, **kwargs: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout
    return done.stdout


def away(home: Path) -> dict[str, str]:
    """The environment of somebody with an empty home, except that kernels once compiled are not compiled again."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SELFLOOP_", "PYTHON"))}
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": cache}


def answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    assert server.poll() is None, "the server ended"
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_its_files_are_those_of_the_clone(installed: Path, tmp_path: Path):
    program = """
import selfloop, sys
from selfloop.cli import client_env, demo
print(selfloop.__file__)
print(client_env.carried("requirements/client.txt").read_text(), end="")
print((demo.EXAMPLES / "quickstart.py").read_text() + (demo.EXAMPLES / "data" / "captain.jsonl").read_text(), end="")
"""
    said = run(str(installed / "python"), "-c", program, cwd=tmp_path, env=away(tmp_path))
    place, _, files = said.partition("\n")
    assert Path(place).is_relative_to(installed.parent)
    carried = ("requirements/client.txt", "examples/quickstart.py", "examples/data/captain.jsonl")
    assert files == "".join((REPO / name).read_text() for name in carried)


def test_every_file_of_the_package_is_in_it(installed: Path):
    (package,) = installed.parent.glob("lib/python*/site-packages/selfloop")
    tracked = run("git", "-C", str(REPO), "ls-files", "src/selfloop").split()
    missing = [name for name in tracked if not (package / Path(name).relative_to("src/selfloop")).is_file()]
    assert not missing


def test_the_server_serves_its_page(installed: Path, tmp_path: Path):
    port = free_port()
    command = [str(installed / "selfloop"), "serve", "--port", str(port), "--no-prepare"]
    with subprocess.Popen(command, cwd=tmp_path, env=away(tmp_path), stdout=subprocess.DEVNULL) as server:
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/healthz", server), "the server answers")
            page = httpx.get(f"http://127.0.0.1:{port}/", headers={"Accept": "text/html"}, follow_redirects=True)
            assert page.status_code == 200
            assert "<title>" in page.text
        finally:
            server.terminate()
            server.wait(60)
    assert (tmp_path / ".selfloop").is_dir()

"""Finding and making the environment of the official client."""

import sys
from pathlib import Path

import pytest

from selfloop.cli import client_env


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone without environments, in which this interpreter has no client."""
    monkeypatch.setattr(client_env, "CLONE", tmp_path)
    monkeypatch.setattr(client_env, "has_client_here", lambda: False)
    return tmp_path


def fake_python(environment: Path, code: int) -> Path:
    python = client_env.python_of(environment)
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    python.chmod(0o755)
    return python


def test_the_clones_environment_comes_first(clone: Path):
    other = clone / "data" / "client-env"
    assert client_env.find_client_python(other) is None
    expected = fake_python(other, code=0)
    assert client_env.find_client_python(other) == str(expected)
    expected = fake_python(clone / ".venv-client", code=0)
    assert client_env.find_client_python(other) == str(expected)


def test_an_interpreter_that_does_not_run_is_passed_over(clone: Path):
    fake_python(clone / ".venv-client", code=127)
    assert client_env.find_client_python() is None


def test_set_up_goes_on_without_a_newer_python(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(client_env, "newer_pythons", lambda: iter(()))
    monkeypatch.setattr(sys, "argv", ["client_env", str(clone / ".venv-client")])
    client_env.main()
    assert "Python 3.12 or newer" in capsys.readouterr().out
    assert not (clone / ".venv-client").exists()


def test_a_failed_install_says_why(clone: Path):
    fake_python(clone / "env", code=0)
    client_env.python_of(clone / "env").write_text("#!/bin/sh\necho no such package\n[ $1 = -c ]\n")
    with pytest.raises(client_env.ClientEnvironmentFailed, match="no such package"):
        client_env.make_environment(clone / "env", sys.executable)


def test_the_pins_name_the_version_we_know():
    pins = client_env.carried("requirements/client.txt").read_text().split()
    assert f"{client_env.CLIENT_PACKAGE}=={client_env.CLIENT_VERSION}" in pins

"""A served tiny model and gateways on it, shared by the tests that go over HTTP."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import hypothesis
import jaxtyping
import pytest

import backend_counts
import stores
from gateway import EXPERTS, KEY, MODEL, REPO, Gateway, copy_data, selfloop

if TYPE_CHECKING:
    from seeing_gateway import SeeingGateway

# As many tests at once as there are cores: with more threads than that, those of OpenMP wait for each other in loops.
# Before anything imports torch. A test of several threads says so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The shapes that losses declare are checked in every call.
jaxtyping.install_import_hook("selfloop.engine.losses", "checked_types.checked")

# How long an example takes depends on the machine, not on us.
hypothesis.settings.register_profile("selfloop", deadline=None)
hypothesis.settings.load_profile("selfloop")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which backends were tried and by which path this CPU computed: what it lacks is not skipped in silence."""
    if (tried := backend_counts.line(terminalreporter.stats)) is not None:
        terminalreporter.write_line(tried)
    if os.environ.get("CI") or "torch" in sys.modules:
        program = (
            "from selfloop.engine.backends.cpu_native.build import look",
            "found = look()",
            "print(getattr(found, 'reason', None) or found.words)",
        )
        look = "; ".join(program)
        found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
        terminalreporter.write_line(f"computed by: {found.stdout.strip() or found.stderr.strip()[-200:]}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a run that was to try the CPU kernels, and has not, is no success."""
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and backend_counts.is_untried(reporter.stats, "cpu_native"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure() -> None:
    stores.servers.close()


@pytest.fixture(scope="session")
def postgres() -> stores.PostgresServer:
    """A real PostgreSQL server, shared; make databases of your own on it."""
    try:
        return stores.servers.postgres
    except stores.Missing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with weights, tokenizer and chat template."""
    import served_model  # torch and transformers, only for those who serve it

    return served_model.save(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def data_template(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory whose catalogue has the tiny model; copied for each gateway."""
    template = tmp_path_factory.mktemp("template") / "data"
    selfloop("models", "add", str(tiny_model_folder), "--name", MODEL, "--data-dir", str(template))
    return template


@pytest.fixture(scope="session")
def experts_template(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and a model with experts."""
    import served_model

    folder = served_model.save_experts(tmp_path_factory.mktemp("model") / "tiny-experts")
    template = copy_data(data_template, tmp_path_factory.mktemp("template-experts") / "data")
    selfloop("models", "add", str(folder), "--name", EXPERTS, "--data-dir", str(template))
    return template


@pytest.fixture(scope="session")
def experts_gateway(experts_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """As ``gateway``, and serves a model with experts, too."""
    shared = Gateway(copy_data(experts_template, tmp_path_factory.mktemp("shared-experts") / "data")).start()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def gateway(data_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway that tests share: make your own runs on it, and never stop it."""
    shared = Gateway(copy_data(data_template, tmp_path_factory.mktemp("shared") / "data")).start()
    yield shared
    shared.close()


@pytest.fixture
def new_gateway(data_template: Path, tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Starts gateways of a test's own, to be killed at will; takes options of ``selfloop serve``."""
    started: list[Gateway] = []

    def start(*options: str) -> Gateway:
        started.append(Gateway(copy_data(data_template, tmp_path / f"data-{len(started)}")))
        return started[-1].start(KEY, *options)

    yield start
    for own in started:
        own.close()


@pytest.fixture(scope="session")
def http(gateway: Gateway) -> httpx.Client:
    """A client of the shared gateway, with its first key."""
    return gateway.http()


@pytest.fixture(scope="session")
def other_team(gateway: Gateway) -> httpx.Client:
    """A client of the shared gateway, with a key of another team."""
    made = selfloop("keys", "create", "other", "--team", "other", "--data-dir", str(gateway.data_dir))
    return gateway.http(made.split()[-1])


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[SeeingGateway]":
    """A gateway with models that see, shared: make your own runs on it, and never stop it."""
    from seeing_gateway import SeeingGateway  # torch and transformers, only for those who serve it

    shared = SeeingGateway(tmp_path_factory.mktemp("seeing"))
    yield shared
    shared.gateway.close()


@pytest.fixture(scope="session")
def client_python() -> str:
    """A Python that has the official client, which needs 3.12 or newer."""
    candidates = [os.environ.get("SELFLOOP_CLIENT_PYTHON"), str(REPO / ".venv-client" / "bin" / "python")]
    for candidate in [*candidates, sys.executable]:
        if candidate and Path(candidate).exists() and _has_client(candidate):
            return candidate
    missing = (
        "no Python with the official client: `make setup` makes one in .venv-client; or name one in "
        "SELFLOOP_CLIENT_PYTHON (3.12 or newer, with baseten-loops and jinja2)"
    )
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def _has_client(python: str) -> bool:
    probe = "import importlib.util as u, sys; sys.exit(not (u.find_spec('baseten') and u.find_spec('baseten.loops')))"
    return subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def tinker_python() -> str:
    """A Python that has the SDK."""
    candidates = [os.environ.get("SELFLOOP_TINKER_PYTHON"), str(REPO / ".venv-tinker" / "bin" / "python")]
    for candidate in candidates:
        if candidate and Path(candidate).exists() and _has_sdk(candidate):
            return candidate
    missing = "no tinker SDK: `make setup` makes one in .venv-tinker; or name a Python in SELFLOOP_TINKER_PYTHON"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def _has_sdk(python: str) -> bool:
    # Of the one that was named by hand any version will do: how a newer one fares is what is asked.
    named = python == os.environ.get("SELFLOOP_TINKER_PYTHON")
    probe = f"from importlib.metadata import version; assert {named} or version('tinker') == '0.38.0'"
    return subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def torch_client_python() -> str:
    """A Python that has the official client beside PyTorch."""
    for candidate in (os.environ.get("SELFLOOP_TORCH_CLIENT"), str(REPO / ".venv-torch-client" / "bin" / "python")):
        if candidate and Path(candidate).exists():
            return candidate
    missing = (
        "no official client beside PyTorch: `make setup` makes one in .venv-torch-client; or name a Python in "
        "SELFLOOP_TORCH_CLIENT"
    )
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def cookbook_python() -> str:
    """A Python that has the Tinker cookbook, and the SDK with PyTorch."""
    for candidate in (os.environ.get("SELFLOOP_COOKBOOK_PYTHON"), str(REPO / ".venv-cookbook" / "bin" / "python")):
        if candidate and Path(candidate).exists():
            return candidate
    missing = "no cookbook: `make setup` makes one in .venv-cookbook; or name a Python in SELFLOOP_COOKBOOK_PYTHON"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def truss_command() -> Path:
    """The ``truss`` command, in an environment of its own."""
    candidates = [os.environ.get("SELFLOOP_TRUSS"), str(REPO / ".venv-truss" / "bin" / "truss")]
    found = next((c for c in candidates if c and Path(c).exists()), None)
    if found is not None:
        return Path(found)
    missing = "no truss: `make setup` makes one in .venv-truss; or name one in SELFLOOP_TRUSS"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)

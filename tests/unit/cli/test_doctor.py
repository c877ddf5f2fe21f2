"""What the doctor sees, and what it advises."""

import socket
import sqlite3
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from typer.testing import CliRunner

import tiny_models
from selfloop.cli import client_env, doctor, engine_libraries
from selfloop.cli.doctor import Verdict
from selfloop.cli.main import app
from selfloop.convert import embedded
from selfloop.storage.db import migrate
from selfloop.storage.db.address import sqlite_url
from selfloop.types.speed import Speed


@contextmanager
def http_server(body: bytes) -> Generator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_env, "find_client_python", lambda *environments: None)
    monkeypatch.setattr(client_env, "newer_pythons", lambda: iter(()))


def test_a_machine_that_can_serve(tmp_path: Path, no_client: None):
    result = CliRunner().invoke(app, ["doctor", "--data-dir", str(tmp_path / "new"), "--port", str(free_port())])
    assert result.exit_code == 0, result.output
    for word in ("PyTorch", "memory", "database", "embedded model", "official client", "Ready: selfloop serve"):
        assert word in result.output
    assert not (tmp_path / "new").exists(), "the doctor only looks"


def test_a_problem_is_exit_code_one(tmp_path: Path, no_client: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_libraries.importlib.util, "find_spec", lambda name: None)
    arguments = ["doctor", "--data-dir", str(tmp_path), "--port", str(free_port())]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "Not ready: engine libraries, PyTorch." in result.output
    assert "pip install 'selfloop[engine]'" in result.output
    assert doctor.check_torch().found == "not installed"


def test_a_torch_that_does_not_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_PROBE_TORCH", "raise ImportError('libcudart is missing')")
    check = doctor.check_torch()
    assert check.verdict is Verdict.PROBLEM
    assert "libcudart is missing" in check.found


@pytest.mark.parametrize(
    ("lacking", "gpus", "verdict", "words"),
    [
        ("null", "[]", doctor.Verdict.OK, "kernels of our own"),
        ('["no compiler", "; install g++"]', "[]", doctor.Verdict.WARNING, "no compiler"),
        ('["AMX", ""]', "[]", doctor.Verdict.OK, "without kernels of our own: AMX"),
        ('["no compiler", "; install g++"]', '["H100"]', doctor.Verdict.OK, "H100"),
    ],
)
def test_the_kernels_are_looked_at(
    lacking: str, gpus: str, verdict: doctor.Verdict, words: str, monkeypatch: pytest.MonkeyPatch
):
    answer = f'{{"version": "9.9", "gpus": {gpus}, "lacking": {lacking}}}'
    monkeypatch.setattr(doctor, "_PROBE_TORCH", f"print({answer!r})")
    check = doctor.check_torch()
    assert check.verdict is verdict
    assert words in check.found
    assert ("install g++" in check.advice) == (verdict is doctor.Verdict.WARNING)


def test_ports():
    assert doctor.check_port(free_port()).verdict is Verdict.OK
    with http_server(b'{"status": "ok", "version": "9.9.9"}') as port:
        check = doctor.check_port(port)
        assert check.verdict is Verdict.WARNING
        assert "9.9.9" in check.found
        assert "--data-dir" in check.advice
    for body in (b"<html>", b'{"hello": 1}'):
        with http_server(body) as port:
            assert doctor.check_port(port).verdict is Verdict.PROBLEM


def test_databases(tmp_path: Path):
    assert doctor.check_database(tmp_path).found == "made at the first start"
    file = tmp_path / "selfloop.db"
    migrate.upgrade(sqlite_url(file))
    assert doctor.check_database(tmp_path).found == "up to date"
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    assert doctor.check_database(tmp_path).verdict is Verdict.PROBLEM
    file.write_bytes(b"this is no database, whatever its name says" * 100)
    assert doctor.check_database(tmp_path).verdict is Verdict.PROBLEM


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert doctor.check_disk(tmp_path / "a" / "b").verdict in (Verdict.OK, Verdict.WARNING)
    (tmp_path / "file").write_text("")
    assert doctor.check_disk(tmp_path / "file").verdict is Verdict.PROBLEM
    for free, verdict in ((10**7, Verdict.PROBLEM), (10**9, Verdict.WARNING), (10**10, Verdict.OK)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert doctor.check_disk(tmp_path).verdict is verdict


def test_memory(monkeypatch: pytest.MonkeyPatch):
    for free, verdict in ((10**9, Verdict.WARNING), (10**10, Verdict.OK)):
        monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert doctor.check_memory().verdict is verdict


def test_bfloat16(tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx512_bf16\n")
    assert "with bfloat16" in doctor.check_cpu(cpuinfo).found
    cpuinfo.write_text("flags : fpu avx2\n")
    assert "float32" in doctor.check_cpu(cpuinfo).found
    assert doctor.check_cpu(tmp_path / "absent").verdict is Verdict.OK


def test_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert (doctor.EMBEDDED_PACKAGE, doctor.EMBEDDED_VERSION) == (embedded.PACKAGE, embedded.VERSION)

    def not_installed(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", not_installed)
    assert doctor.check_model(tmp_path).verdict is Verdict.WARNING
    monkeypatch.setattr(doctor.metadata, "version", lambda name: doctor.EMBEDDED_VERSION)
    assert doctor.check_model(tmp_path).verdict is Verdict.OK
    (tmp_path / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct").mkdir(parents=True)
    assert "prepared" in doctor.check_model(tmp_path).found


def test_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_env, "find_client_python", lambda *environments: "/here/python")
    assert doctor.check_client(tmp_path).verdict is Verdict.OK
    monkeypatch.setattr(client_env, "find_client_python", lambda *environments: None)
    monkeypatch.setattr(client_env, "newer_pythons", lambda: iter(["/there/python3.12"]))
    assert "/there/python3.12" in doctor.check_client(tmp_path).found
    monkeypatch.setattr(client_env, "newer_pythons", lambda: iter(()))
    assert "3.12" in doctor.check_client(tmp_path).advice


@pytest.mark.parametrize(
    ("addresses", "verdict", "word"),
    [
        (["127.0.0.1"], Verdict.OK, "resolves to this machine"),
        (["203.0.113.9"], Verdict.WARNING, "not this machine"),
        ([], Verdict.WARNING, "does not resolve"),
    ],
)
def test_the_name_that_truss_calls(monkeypatch: pytest.MonkeyPatch, addresses: list[str], verdict: Verdict, word: str):
    def resolve(host: str, port: None) -> list[object]:
        assert host == "api.localhost"
        if not addresses:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    check = doctor.check_truss_name()
    assert (check.verdict, word in check.found) == (verdict, True)
    assert ("/etc/hosts" in check.advice) == (verdict is Verdict.WARNING)


@pytest.mark.parametrize("model", [True, False])
def test_the_speed_of_a_model_folder(model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # What is measured, not how fast: a busy machine may take as long as it wants.
    monkeypatch.setattr(doctor, "_BENCH_LIMIT_S", 300)
    folder = tiny_models.save("llama", tmp_path / "model") if model else tmp_path
    result = CliRunner().invoke(app, ["doctor", "--bench", "--model", str(folder)], env={"COLUMNS": "120"})
    if not model:
        assert result.exit_code == 1
        assert "holds no config.json" in result.output
        return
    assert result.exit_code == 0, result.output
    for word in ("product, float32", "GFLOP/s", "GB/s", "tokens a step, rank 32", "decoding, 32 streams", "%"):
        assert word in result.output


def test_products_are_measured_in_what_the_engine_computes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bfloat16 on a CPU without instructions for it takes minutes."""
    monkeypatch.setattr(doctor, "_BENCH_LIMIT_S", 300)
    folder = tiny_models.save("llama", tmp_path / "model")
    as_avx2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    result = CliRunner().invoke(app, ["doctor", "--bench", "--model", str(folder)], env={"COLUMNS": "120", **as_avx2})
    assert result.exit_code == 0, result.output
    assert "float32 on cpu" in " ".join(result.output.split())
    assert "PyTorch's operators" in result.output
    assert "product, bfloat16" not in result.output


def test_a_bench_that_takes_too_long_shows_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A large model on a slow machine: the process is ended, and what was not reached is said."""
    known = Speed("big", "cpu", "float32", "plain", 2, float32_gflops=30.0, memory_gb_per_s=10.0)
    line = msgspec.json.encode(known).decode()
    slow = f"print({line!r}, flush=True); print('{{\"cut', end='', flush=True); import time; time.sleep(600)"
    monkeypatch.setattr(doctor, "_BENCH_LIMIT_S", 2)
    monkeypatch.setattr(doctor, "_bench_command", lambda model_dir: [sys.executable, "-c", slow])
    result = CliRunner().invoke(app, ["doctor", "--bench", "--model", str(tmp_path)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "30.0 GFLOP/s" in result.output
    assert result.output.count("not within 2 s") == 3
    monkeypatch.setattr(
        doctor, "_bench_command", lambda model_dir: [sys.executable, "-c", "import time; time.sleep(600)"]
    )
    result = CliRunner().invoke(app, ["doctor", "--bench", "--model", str(tmp_path)], env={"COLUMNS": "120"})
    assert result.exit_code == 1
    assert "took more than 2 s to load" in result.output

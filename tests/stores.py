"""Where the tests keep rows and checkpoints: SQLite and files, or a real PostgreSQL server and a real S3 server.

With ``SELFLOOP_TEST_STORES=postgres+s3`` the whole suite runs on the two servers (``make test-stores``), each of its
data directories with a database and a prefix of its own.
"""

import contextlib
import getpass
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import boto3
import httpx
import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL

from selfloop.control.data_dir.identity import DATABASE_FILE
from selfloop.control.gateway import DataDirectory
from selfloop.storage.db import migrate
from selfloop.storage.db.address import parse_database_url, sqlite_url
from selfloop.storage.db.backend import WRITER_LOCK

PASSWORD = "correct-horse-battery-staple"
BUCKET = "checkpoints"
S3_SERVERS = ("nanio", "moto")
ON_SERVERS = os.environ.get("SELFLOOP_TEST_STORES") == "postgres+s3"
_TEMPLATE = "migrated"


class Missing(Exception):
    """A server's programs are not installed."""


def free_port() -> int:
    """One below those that the system hands out for outgoing connections: nobody takes it before its server does."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait(is_up: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not is_up():
        is_over = process.poll() is not None or time.monotonic() > deadline
        assert not is_over, log.read_text(errors="replace")
        time.sleep(0.05)


class PostgresServer:
    """A temporary cluster; PostgreSQL refuses to run as root, so then it is another user's."""

    def __init__(self) -> None:
        self._bin = _postgres_programs()
        self.folder = Path(tempfile.mkdtemp(prefix="selfloop-postgres-"))
        self._user = "nobody" if getpass.getuser() == "root" else None
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        self.port = free_port()
        self._data, self._log = self.folder / "data", self.folder / "log"
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._run("initdb", "-D", self._data, "-U", "tester", "-A", "scram-sha-256", "--pwfile", secret, "-E", "UTF8")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
            with self.admin() as connection:
                connection.execute(f"CREATE DATABASE {_TEMPLATE}")
            migrate.upgrade(self.url(_TEMPLATE))
        except BaseException:
            self.close()
            raise

    def _run(self, program: str, *arguments: object) -> None:
        subprocess.run([self._bin / program, *map(str, arguments)], check=True, capture_output=True, **self._as_user)

    @property
    def _as_user(self) -> dict[str, object]:
        """Where to run, as whom, and with whose home."""
        if self._user is None:
            return {"cwd": self.folder}
        entry = pwd.getpwnam(self._user)
        return {"cwd": self.folder, "user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 300,
            "shared_buffers": "64MB",
            # The tests end the server, not the machine.
            "fsync": "off",
        }
        given = [argument for name, value in options.items() for argument in ("-c", f"{name}={value}")]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, *given], stdout=log, stderr=log, **self._as_user
            )
        _wait(self._is_up, self._process, self._log)

    def _is_up(self) -> bool:
        try:
            self.admin().close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends every session, SIGQUIT is a crash."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(60)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def admin(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(self.text(database), autocommit=True)

    def text(self, database: str) -> str:
        """The address as a user writes it."""
        url = URL.create("postgresql", "tester", PASSWORD, "127.0.0.1", self.port, database)
        return url.render_as_string(hide_password=False)

    def url(self, database: str) -> URL:
        return parse_database_url(self.text(database))

    def ensure(self, database: str, template: str = _TEMPLATE) -> str:
        """The name of a database, made if it is not there."""
        with self.admin() as connection:
            if connection.execute("SELECT FROM pg_database WHERE datname = %s", [database]).fetchone() is None:
                connection.execute(f"CREATE DATABASE {database} TEMPLATE {template}")
        return database


def _postgres_programs() -> Path:
    """The folder of the newest server's programs. Raises :class:`Missing`."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    for folder in [*debian, *([Path(on_path).parent] if on_path else [])]:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise Missing("no PostgreSQL server: on Debian `apt-get install postgresql`, elsewhere have initdb on the PATH")


class S3Server:
    """A server of the S3 protocol over a real socket. This one checks signatures, and keeps objects as files."""

    checks_signatures = True
    survives = True
    """What it has, it has after a restart."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="selfloop-s3-"))
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.key_id, self.secret = "selfloop-tests", "a secret of forty characters or so, all in all"
        self._log = self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        (self.folder / "data" / BUCKET).mkdir(parents=True)
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }

    def _command(self) -> list[str]:
        options = ["--data-dir", str(self.folder / "data"), "--host", "127.0.0.1", "--port", str(self.port)]
        return ["nanio", "serve", *options, "--log-level", "warning", "--no-access-log"]

    def start(self) -> None:
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._command()],
                env=os.environ | {"NANIO_ACCESS_KEY": self.key_id, "NANIO_SECRET_KEY": self.secret},
                stdout=log,
                stderr=log,
            )
        _wait(self._is_up, self._process, self._log)

    def client(self) -> Any:
        session = boto3.Session(self.key_id, self.secret, region_name="us-east-1")
        return session.client("s3", endpoint_url=self.endpoint)

    def _is_up(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(self.endpoint, timeout=5)
            return True
        return False

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class MotoServer(S3Server):
    """The server that most projects test their S3 clients with. It keeps objects in memory, and takes any signature."""

    checks_signatures = False
    survives = False

    def _command(self) -> list[str]:
        return ["moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def start(self) -> None:
        super().start()
        self.client().create_bucket(Bucket=BUCKET)


class Servers:
    """Each started when it is first asked for."""

    def __init__(self) -> None:
        self._postgres: PostgresServer | None = None
        self._s3: S3Server | None = None
        self._moto: MotoServer | None = None

    @property
    def postgres(self) -> PostgresServer:
        if self._postgres is None:
            self._postgres = PostgresServer()
        return self._postgres

    @property
    def s3(self) -> S3Server:
        if self._s3 is None:
            self._s3 = S3Server()
        return self._s3

    @property
    def moto(self) -> MotoServer:
        if self._moto is None:
            self._moto = MotoServer()
        return self._moto

    def s3_named(self, name: str) -> S3Server:
        """One of :data:`S3_SERVERS`."""
        return {"nanio": lambda: self.s3, "moto": lambda: self.moto}[name]()

    def close(self) -> None:
        # The quick one first: whoever ends the tests may not wait for the other's files to be deleted.
        for server in (self._s3, self._moto, self._postgres):
            if server is not None:
                server.close()
        self._postgres = self._s3 = self._moto = None


servers = Servers()


def name_of(data_dir: Path) -> str:
    """Of the database and the prefix that belong to a data directory."""
    return "t" + hashlib.sha1(str(data_dir).encode()).hexdigest()[:20]


def database_url(data_dir: Path, file: str = "test.db") -> URL:
    """A migrated database for a data directory of a test."""
    if ON_SERVERS:
        return servers.postgres.url(servers.postgres.ensure(name_of(data_dir)))
    url = sqlite_url(data_dir / file)
    migrate.upgrade(url)
    return url


def environment(data_dir: Path) -> dict[str, str]:
    """What gives a command the database and the store of a data directory."""
    if not ON_SERVERS:
        return {}
    name = servers.postgres.ensure(name_of(data_dir))
    s3 = servers.s3
    own = {"SELFLOOP_DATABASE_URL": servers.postgres.text(name), "SELFLOOP_STORE": f"s3://{BUCKET}/{name}"}
    return own | s3.environment


def copy(template: Path, target: Path) -> Path:
    """Copy a data directory, with what belongs to it elsewhere."""
    if ON_SERVERS:
        servers.postgres.ensure(name_of(target), name_of(template))
        saved = servers.s3.folder / "data" / BUCKET / name_of(template)
        if saved.exists():
            shutil.copytree(saved, saved.with_name(name_of(target)))
    return Path(shutil.copytree(template, target))


def checkpoints(data_dir: Path) -> Path:
    """The folder in which a data directory's checkpoints lie as folders; the S3 server keeps objects as files."""
    if ON_SERVERS:
        return servers.s3.folder / "data" / BUCKET / name_of(data_dir) / "checkpoints"
    return data_dir / "checkpoints"


def forget_cached(data_dir: Path, checkpoint_id: str) -> None:
    """Have the files of a checkpoint read from the bucket again."""
    shutil.rmtree(data_dir / "cache" / "checkpoints" / checkpoint_id, ignore_errors=True)


def damage(data_dir: Path, checkpoint_id: str, name: str) -> None:
    """Cut the end off a checkpoint's file."""
    _change(data_dir, checkpoint_id, name, lambda content: content[:-10])


def flip(data_dir: Path, checkpoint_id: str, name: str) -> None:
    """Flip a high bit of an exponent in the middle of a checkpoint's file."""

    def flipped(content: bytes) -> bytes:
        place = len(content) // 8 * 4 - 1
        return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]

    _change(data_dir, checkpoint_id, name, flipped)


def _change(data_dir: Path, checkpoint_id: str, name: str, change: Callable[[bytes], bytes]) -> None:
    path = checkpoints(data_dir) / checkpoint_id / name
    content = change(path.read_bytes())
    if not ON_SERVERS:
        path.write_bytes(content)
        return
    # By the bucket's own protocol: its server knows how long each file is.
    key = path.relative_to(servers.s3.folder / "data" / BUCKET)
    servers.s3.client().put_object(Bucket=BUCKET, Key=str(key), Body=content)
    forget_cached(data_dir, checkpoint_id)


def passwords() -> dict[str, str]:
    """What the servers are opened with."""
    return {"password of the database": PASSWORD, "key of the bucket": servers.s3.secret} if ON_SERVERS else {}


def data_directory(path: Path) -> DataDirectory:
    """A data directory that commands work on, in this process."""
    own = environment(path)
    # The bucket's client finds its credentials here only.
    os.environ.update({name: value for name, value in own.items() if name.startswith("AWS_")})
    return DataDirectory(path, own.get("SELFLOOP_DATABASE_URL"), own.get("SELFLOOP_STORE"))


@contextlib.contextmanager
def held(data_dir: Path) -> Generator[None]:
    """Hold the writers' lock of a data directory's database, as another process would."""
    if ON_SERVERS:
        with servers.postgres.admin(name_of(data_dir)) as connection:
            connection.execute("SELECT pg_advisory_lock(%s, %s)", WRITER_LOCK)
            yield
    else:
        with contextlib.closing(sqlite3.connect(data_dir / DATABASE_FILE, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
            connection.execute("ROLLBACK")


def execute(data_dir: Path, statement: str) -> list[tuple[object, ...]]:
    """Look at rows, or change those of a gateway that does not run; returns what there is to return."""
    url = servers.postgres.url(name_of(data_dir)) if ON_SERVERS else sqlite_url(data_dir / DATABASE_FILE)
    engine = create_engine(url)
    with engine.begin() as connection:
        done = connection.execute(text(statement))
        rows = [tuple(row) for row in done] if done.returns_rows else []
    engine.dispose()
    return rows

"""What a data directory says, read by the server's own readers, and how that changes with one flipped bit."""

import asyncio
import random
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from sqlalchemy.exc import SQLAlchemyError

from selfloop.control.data_dir.disk_space import DiskRoom
from selfloop.control.observe.observer import Observer
from selfloop.control.observe.usage import Usage
from selfloop.control.queue.journal import Journal
from selfloop.control.queue.outcomes import Outcomes
from selfloop.control.queue.recovery import reopen
from selfloop.control.resources.catalogue import Catalogue
from selfloop.engine.engine import Engine
from selfloop.storage.blobs.checkpoints import LocalCheckpoints
from selfloop.storage.blobs.local import LocalBlobs
from selfloop.storage.db import queries_resources
from selfloop.storage.db.address import sqlite_url
from selfloop.storage.db.database import Database
from selfloop.types.blob_ref import DATA, local_path
from selfloop.types.digests import check_file, digest_of
from selfloop.types.errors import NotFound, OperationFailed, SelfloopError
from selfloop.types.operation import LoadState
from selfloop.worker.client.worker_client import WorkerClient
from selfloop.worker.protocol import Command, Execute, ModelInfo, OpenRun

_PROGRESS_EVERY = 500
# Beside a few dozen small files, the database has most of what can be read wrongly.
_DATABASE_WEIGHT = 4
# What a request may end in; an error of another class would be a 500 or the end of an operation with that class.
# (The last is SQLite's driver's, whose own message quotes a name that is no text any more.)
_FORESEEN = (SelfloopError, SQLAlchemyError, OSError, UnicodeDecodeError)


class Recorder:
    """A worker that opens runs, and notes what it would compute instead of computing it."""

    def __init__(self, engine: Engine, roots: Mapping[str, Path]) -> None:
        self._engine = engine
        self._roots = roots
        self.ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.ready.set_result(ModelInfo(1, 1, 1, "float32", "cpu"))
        self.seen: list[str] = []

    def call(self, command: Command, payload: bytes = b"") -> "asyncio.Future[bytes]":
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        try:
            self._do(command, payload)
        except OperationFailed as error:
            future.set_exception(error)
        else:
            future.set_result(b"")
        return future

    def _do(self, command: Command, payload: bytes) -> None:
        match command:
            case OpenRun(run_id, rank, seed, initial, snapshot, targets, with_optimizer):
                # A run that is opened again begins again.
                self.seen.clear()
                if snapshot is not None:
                    self._engine.restore(run_id, local_path(snapshot, self._roots))
                else:
                    start = None if initial is None else local_path(initial, self._roots)
                    self._engine.init_run(
                        run_id, rank=rank, seed=seed, initial=start, with_optimizer=with_optimizer, targets=targets
                    )
                self.seen.append(state_of(self._engine, run_id))
            case Execute(run_id, seed, targets=targets):
                self.seen.append(digest_of(f"{run_id} {seed} {targets}".encode(), payload))
            case _:
                raise AssertionError(command)


def state_of(engine: Engine, run_id: str) -> str:
    """Digest of everything that training goes on from."""
    run = engine._runs[run_id]
    tensors = [run.theta_P]
    tensors += [] if run.moments is None else [run.moments.mean_P, run.moments.square_P]
    tensors += [] if run.accumulated is None else [run.accumulated.grad_P]
    rest = (run.step, run.alpha, run.shape.rank, str(run.shape.targets), run.moments and run.moments.num_updates)
    return digest_of(repr(rest).encode(), *(tensor.numpy().tobytes() for tensor in tensors))


@dataclass(frozen=True)
class Known:
    """What was in the data directory before anything changed: its runs, operations and checkpoints."""

    runs: Sequence[str]
    operations: Sequence[tuple[str, str]]
    checkpoints: Sequence[tuple[str, str, str, str]]

    @classmethod
    def of(cls, data_dir: Path) -> "Known":
        with closing(sqlite3.connect(data_dir / "selfloop.db")) as connection:

            def rows(query: str) -> list[tuple[str, ...]]:
                return connection.execute(query).fetchall()

            return cls(
                [run for (run,) in rows("SELECT id FROM runs WHERE status = 'ACTIVE'")],
                cast(Sequence[tuple[str, str]], rows("SELECT run_id, id FROM operations")),
                cast(Sequence[tuple[str, str, str, str]], rows("SELECT id, run_id, target, name FROM checkpoints")),
            )


Facts = dict[str, str]
"""By name: a digest of what is read and used, or ``refused: <error>``."""


async def read_all(data_dir: Path, known: Known, engine: Engine, about: str = "") -> Facts:
    """What a server would train on, sample from or give out; ``about`` the part that reads a file, or all of it."""
    db, blobs = Database(sqlite_url(data_dir / "selfloop.db")), LocalBlobs(data_dir)
    store, journal = LocalCheckpoints(blobs), Journal(db, blobs)
    disk_room = DiskRoom(blobs, Catalogue(db, data_dir))
    outcomes = Outcomes(db, store, journal, Observer(Usage(db)), disk_room, lambda _run, _result: None)
    facts: Facts = {}

    async def note(name: str, read: Callable[[], Awaitable[str]]) -> None:
        if about not in name:
            return
        try:
            facts[name] = await read()
        except _FORESEEN as error:
            facts[name] = f"refused: {getattr(error, 'error_class', type(error).__name__)}"
        except Exception as error:  # Nothing was used of it all the same; counted apart.
            facts[name] = f"refused: unforeseen {type(error).__name__}"

    async def recovered(run_id: str) -> str:
        async with db.look_up() as session:
            run = (await queries_resources.run_rows(session, {run_id})).get(run_id)
        if run is None:
            raise NotFound("run", run_id)
        recorder = Recorder(engine, {DATA: data_dir})
        await reopen(run, cast(WorkerClient, recorder), journal, blobs, outcomes)
        return digest_of(*(line.encode() for line in recorder.seen))

    async def outcome(run_id: str, id: str) -> str:
        row = await journal.get(run_id, id)
        if row is None:
            raise NotFound("operation", id)
        return digest_of(await journal.result(row) or b"")

    async def loaded(run_id: str, target: str, name: str) -> str:
        async with db.look_up() as session:
            run = (await queries_resources.run_rows(session, {run_id})).get(run_id)
        if run is None:
            raise NotFound("run", run_id)
        folder = "weights" if target == "trainer" else "sampler_weights"
        operation = LoadState(f"bt://loops:{run_id}/{folder}/{name}", target == "trainer")
        path = local_path(await outcomes.read_from(run, operation), {DATA: data_dir})
        engine.init_run("loaded", rank=run.initial_rank, seed=0)
        engine.load_checkpoint("loaded", path, with_optimizer=target == "trainer")
        engine.load_adapter("loaded", path)
        return state_of(engine, "loaded")

    async def downloaded(id: str, name: str) -> str:
        folder = await store.folder(id)
        check_file(folder, name)
        return digest_of((folder / name).read_bytes())

    try:
        for run_id in known.runs:
            await note(f"run {run_id}", lambda run_id=run_id: recovered(run_id))
        for run_id, id in known.operations:
            await note(f"result of {id}", lambda run_id=run_id, id=id: outcome(run_id, id))
        for id, run_id, target, name in known.checkpoints:
            await note(f"load of {id}", lambda r=run_id, t=target, n=name: loaded(r, t, n))
            for file in ("adapter_config.json", "adapter_model.safetensors", "selfloop.json"):
                await note(f"download of {id}/{file}", lambda id=id, file=file: downloaded(id, file))
    finally:
        await db.close()
    return facts


@dataclass
class Tally:
    """What became of the flips, by the kind of file."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    errors: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        kinds = sorted({kind for kind, _ in self.ends})
        columns = ("noticed", "harmless", "not read", "wrong")
        lines = [f"{'':12}" + "".join(f"{column:>10}" for column in columns)]
        lines += [f"{kind:12}" + "".join(f"{self.ends[kind, column]:>10,}" for column in columns) for kind in kinds]
        total = "".join(f"{sum(self.ends[kind, column] for kind in kinds):>10,}" for column in columns)
        return "\n".join([*lines, f"{'all':12}{total}", *(f"  {n:,} x {e}" for e, n in self.errors.most_common())])


def files_of(data_dir: Path) -> list[Path]:
    return sorted(path for path in data_dir.rglob("*") if path.is_file() and path.stat().st_size)


def _about(name: Path) -> str:
    """Part of the names of the facts that a file can change."""
    match name.parts:
        case ("checkpoints", id, _):
            return id
        case ("snapshots", run_id, *_):
            return f"run {run_id}"
        case ("journal", _, file) if file.endswith(".result"):
            return f"result of {file.removesuffix('.result')}"
        case ("journal", run_id, _):
            return f"run {run_id}"
        case _:
            return ""


async def _without_newest_snapshots(data_dir: Path, known: Known, engine: Engine) -> Facts:
    """What recovery does of each run when its newest snapshot is damaged."""
    with closing(sqlite3.connect(data_dir / "selfloop.db")) as connection:
        keys = [key for (key,) in connection.execute("SELECT snapshot_key FROM runs WHERE snapshot_key IS NOT NULL")]
    for key in keys:
        (data_dir / key).rename(data_dir / f"{key}.aside")
    facts = await read_all(data_dir, known, engine)
    for key in keys:
        (data_dir / f"{key}.aside").rename(data_dir / key)
    return {name: fact for name, fact in facts.items() if name.startswith("run ")}


def _restore_rows(database: Path, content: bytes) -> None:
    """A fallback is recorded in the database."""
    for left in ("-wal", "-shm"):
        database.with_name(database.name + left).unlink(missing_ok=True)
    database.write_bytes(content)


async def flip_and_read(data_dir: Path, engine: Engine, num_flips: int, seed: int) -> Tally:
    """Flip one random bit of one random file, read everything, put it back; so often."""
    known, rng, tally = Known.of(data_dir), random.Random(seed), Tally()
    sound = await read_all(data_dir, known, engine)
    assert not any(fact.startswith("refused") for fact in sound.values()), sound
    files = files_of(data_dir)
    database = data_dir / "selfloop.db"
    before_rows = database.read_bytes()
    fallen_back = await _without_newest_snapshots(data_dir, known, engine)
    _restore_rows(database, before_rows)
    for done in range(num_flips):
        if done and done % _PROGRESS_EVERY == 0:
            print(f"\nafter {done:,}\n{tally}", flush=True)
        path = rng.choice([*files, *[database] * _DATABASE_WEIGHT])
        kind = path.relative_to(data_dir).parts[0]
        content = path.read_bytes()
        bit = rng.randrange(len(content) * 8)
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        facts = await read_all(data_dir, known, engine, _about(path.relative_to(data_dir)))
        path.write_bytes(content)
        _restore_rows(database, before_rows)
        refused = {fact for name, fact in facts.items() if fact != sound[name] and fact.startswith("refused")}
        others = [name for name, fact in facts.items() if fact != sound[name] and not fact.startswith("refused")]
        wrong = [name for name in others if facts[name] != fallen_back.get(name)]
        is_read = kind in ("checkpoints", "snapshots", "journal", "samples", "initial", "held", "selfloop.db")
        end = "wrong" if wrong else "noticed" if refused or others else "harmless" if is_read else "not read"
        tally.ends[kind, end] += 1
        tally.errors.update(refused)
        if others and not wrong:
            tally.errors["the snapshot before was used"] += 1
        if wrong:
            tally.wrong.append(f"bit {bit} of {path.relative_to(data_dir)}: {wrong}")
    return tally

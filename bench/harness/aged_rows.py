"""An aged database: what a busy server leaves behind in three months, written in seconds."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, insert
from sqlalchemy.engine import URL

from selfloop.control.observe.logs import LOG_FILE
from selfloop.storage.db import tables
from selfloop.storage.db.backend import IMMEDIATE, backend_of
from selfloop.types.logline import LogLine

DAY_S = 86_400.0
_CHUNK_ROWS = 2_000
_AGE_S = 90 * DAY_S
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows there are of each kind.

    Args:
        live: the newest runs, which are still open; all others have ended.
        deployed: names that checkpoints were deployed under, each with two versions.
        fresh: part of the finished operations whose results are not old enough to be let go.
    """

    runs: int = 10_000
    checkpoints: int = 50_000
    operations: int = 200_000
    samples: int = 20_000
    usage: int = 60_000
    minutes: int = 20_000
    log_lines: int = 100_000
    deployed: int = 200
    live: int = 50
    fresh: float = 0.75


@dataclass(frozen=True, slots=True)
class Owner:
    """Of every row."""

    team_id: str
    key_id: str
    base_model: str


def id_of(kind: str, number: int) -> str:
    """Seven characters, as in ids: the first is the kind, the others count up."""
    digits = ""
    for _ in range(6):
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return kind + digits


def fill(url: URL, owner: Owner, sizes: Sizes, now: float | None = None) -> None:
    """Add the rows to a migrated database that has the owner's team and key, in one transaction."""
    now = time.time() if now is None else now
    engine = backend_of(url).engine(pool_size=1)
    try:
        with engine.connect().execution_options(**{IMMEDIATE: True}) as connection, connection.begin():
            for table, rows in _all(owner, sizes, now):
                _insert(connection, table, rows)
    finally:
        engine.dispose()


def write_log(data_dir: Path, owner: Owner, sizes: Sizes, now: float | None = None) -> None:
    """Log lines of the runs, in a file that a server appends to."""
    now = time.time() if now is None else now
    encoder = msgspec.json.Encoder()
    folder = data_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG_FILE, "ab") as file:
        for n in range(sizes.log_lines):
            at = now - 7 * DAY_S * (1 - n / max(sizes.log_lines, 1))
            run = n * sizes.runs // max(sizes.log_lines, 1)
            line = LogLine(
                at_ns=int(at * 1e9),
                level="INFO",
                logger="selfloop.events",
                message="forward_backward (seq_id 1) done in 0.123 s",
                team_id=owner.team_id,
                run_id=id_of("r", run),
                deployment_id=id_of("d", run),
            )
            file.write(encoder.encode(line) + b"\n")


def make_folders(data_dir: Path, sizes: Sizes) -> None:
    """A folder for each checkpoint, with one small file."""
    for n in range(sizes.checkpoints):
        folder = data_dir / "checkpoints" / id_of("c", n)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")


def _insert(connection: Connection, table: type[tables.Base], rows: Iterator[Row]) -> None:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK_ROWS:
            connection.execute(insert(table), chunk)
            chunk = []
    if chunk:
        connection.execute(insert(table), chunk)


def _all(owner: Owner, sizes: Sizes, now: float) -> Iterator[tuple[type[tables.Base], Iterator[Row]]]:
    """Tables with their rows, each after those that it refers to."""
    at = _times(sizes.runs, now)
    yield tables.SessionRow, _sessions(owner, sizes, at)
    yield tables.DeploymentRow, _deployments(owner, sizes, at)
    yield tables.RunRow, _runs(owner, sizes, at)
    yield tables.SamplerRow, _samplers(owner, sizes, at)
    yield tables.DeployedModelRow, _models(owner, sizes, at)
    yield tables.SamplerRow, _deployed_samplers(owner, sizes, at)
    yield tables.ModelVersionRow, _versions(sizes)
    yield tables.CheckpointRow, _checkpoints(owner, sizes, at)
    yield tables.OperationRow, _operations(owner, sizes, now)
    yield tables.QueuedSampleRow, _samples(sizes, now)
    yield tables.StatusChangeRow, _changes(sizes, at)
    yield tables.AuditRow, _audit(owner, sizes, at)
    yield tables.UsageRow, _usage(owner, sizes, at)
    yield tables.DeploymentMinuteRow, _minutes(sizes, now)


def _times(num: int, now: float) -> Callable[[int], float]:
    """When run ``n`` was made: the last one just now."""
    return lambda n: now - _AGE_S * (1 - n / max(num - 1, 1))


def _is_live(sizes: Sizes, run: int) -> bool:
    return run >= sizes.runs - sizes.live


def _owned(owner: Owner) -> Row:
    return {"team_id": owner.team_id, "key_id": owner.key_id}


def _sessions(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(sizes.runs):
        end = {"ended_at": at(n) + 3600, "end_reason": "success", "details": '{"tags":[]}'}
        yield {"id": id_of("s", n), "created_at": at(n), **_owned(owner)} | end
    for n in range(2 * sizes.deployed):
        none = {"ended_at": None, "end_reason": None, "details": None}
        yield {"id": id_of("t", n), "created_at": at(n), **_owned(owner)} | none


def _deployments(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(sizes.runs):
        yield {
            "id": id_of("d", n),
            "base_model": owner.base_model,
            "model_name": owner.base_model,
            "status": "SCALED_TO_ZERO" if _is_live(sizes, n) else "STOPPED",
            "scale_down_delay_s": 3600,
            "created_at": at(n),
            "latest_run_id": id_of("r", n),
            **_owned(owner),
        }


def _runs(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(sizes.runs):
        yield {
            "id": id_of("r", n),
            "session_id": id_of("s", n),
            "deployment_id": id_of("d", n),
            "name": f"run {n}",
            "base_model": owner.base_model,
            "model_name": owner.base_model,
            "lora_rank": 8,
            "max_seq_len": 512,
            "initial_rank": 8,
            "seed": n,
            "status": "ACTIVE" if _is_live(sizes, n) else "INACTIVE",
            "created_at": at(n),
            "next_seq": 1 + sizes.operations // max(sizes.runs, 1),
            "epoch": 0,
            "step": 10,
            "snapshot_epoch": 0,
            "snapshot_seq": 1_000_000,
            "with_optimizer": False,
            "capacity_reason": "fresh",
            **_owned(owner),
        }


def _sampler(owner: Owner, id: str, session: str, at: float, status: str) -> Row:
    return {
        "id": id,
        "session_id": session,
        "base_model": owner.base_model,
        "model_name": owner.base_model,
        "model_id": "m" + id[1:],
        "deployment_id": "e" + id[1:],
        "max_seq_len": 512,
        "scale_down_delay_s": 3600,
        "status": status,
        "created_at": at,
        "run_id": None,
        "capacity_reason": "fresh",
        "live_version": 0,
        "num_clones": 0,
        "standing": False,
        **_owned(owner),
    }


def _samplers(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(sizes.runs):
        status = "SCALED_TO_ZERO" if _is_live(sizes, n) else "INACTIVE"
        yield _sampler(owner, id_of("p", n), id_of("s", n), at(n), status) | {"run_id": id_of("r", n)}


def _models(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(sizes.deployed):
        yield {"id": id_of("k", n), "team_id": owner.team_id, "name": f"model {n}", "created_at": at(n)}


def _deployed_samplers(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(2 * sizes.deployed):
        yield _sampler(owner, id_of("q", n), id_of("t", n), at(n), "INACTIVE") | {"model_id": id_of("k", n // 2)}


def _versions(sizes: Sizes) -> Iterator[Row]:
    for n in range(2 * sizes.deployed):
        label = {"hf_secret_name": "none"}
        yield {"sampler_id": id_of("q", n), "model_id": id_of("k", n // 2), "number": 1 + n % 2} | label


def _checkpoints(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(sizes.checkpoints):
        run = n * sizes.runs // max(sizes.checkpoints, 1)
        yield {
            "id": id_of("c", n),
            "run_id": id_of("r", run),
            "team_id": owner.team_id,
            "name": f"step-{n}",
            "target": "sampler" if n % 2 else "trainer",
            "base_model": owner.base_model,
            "step": n % 10,
            "lora_rank": 8,
            "lora_alpha": 32.0,
            "size_bytes": 4_000_000,
            # Several of one moment: a page may end between them.
            "created_at": at(run) + 60 * (n % 5 // 2),
            "public": False,
        }


def _operations(owner: Owner, sizes: Sizes, now: float) -> Iterator[Row]:
    per_run = max(sizes.operations // max(sizes.runs, 1), 1)
    num_old = int(sizes.operations * (1 - sizes.fresh))
    result = msgspec.msgpack.encode({"mode": "lora", "path": "x" * 160})
    for n in range(sizes.operations):
        age_s = 2 * 3600.0 + (num_old - n) * 30.0 if n < num_old else 1800.0 * (1 - n / sizes.operations)
        yield {
            "run_id": id_of("r", n // per_run),
            "id": f"operation-{n}",
            "epoch": 0,
            "seq": 1 + n % per_run,
            "kind": ("forward_backward", "optim_step")[n % 2],
            "fingerprint": f"{n:064x}",
            "state": "done",
            "created_at": now - age_s - 1,
            "finished_at": now - age_s,
            "result": result,
            "key_id": owner.key_id,
            "num_attempts": 0,
        }


def _samples(sizes: Sizes, now: float) -> Iterator[Row]:
    for n in range(sizes.samples):
        age_s = 1800.0 * (1 - n / sizes.samples)
        yield {
            "sampler_id": id_of("p", n % sizes.runs),
            "id": f"sample-{n}",
            "fingerprint": f"{n:064x}",
            "state": "done",
            "created_at": now - age_s - 1,
            "finished_at": now - age_s,
            "result": b"x" * 200,
        }


def _changes(sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(sizes.runs):
        for kind, letter in (("run", "r"), ("deployment", "d"), ("sampler", "p")):
            resource = {"resource": kind, "resource_id": id_of(letter, n)}
            yield resource | {"status": "ACTIVE", "reason": "created", "at": at(n)}
            if not _is_live(sizes, n):
                yield resource | {"status": "INACTIVE", "reason": "deactivated by request", "at": at(n) + 3600}


def _audit(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    for n in range(sizes.runs):
        about = {"run_id": id_of("r", n), "target": "trainer", "name": f"step-{n}", "details": "{}"}
        yield {**_owned(owner), "event": "checkpoint_deleted", "at": at(n)} | about


def _usage(owner: Owner, sizes: Sizes, at: Callable[[int], float]) -> Iterator[Row]:
    per_run = max(sizes.usage // max(sizes.runs, 1), 1)
    names = ("operations", "samples", "tokens_trained", "tokens_forwarded", "tokens_prefilled", "tokens_sampled")
    for n in range(sizes.usage):
        run = n // per_run % max(sizes.runs, 1)
        hour = int(at(run)) // 3600 * 3600 + 3600 * (n % per_run)
        counts: Row = dict.fromkeys(names, n % 97) | {"compute_s": (n % 89) / 7}
        yield {**_owned(owner), "hour": hour, "run_id": id_of("r", run), "sampler_id": ""} | counts


def _minutes(sizes: Sizes, now: float) -> Iterator[Row]:
    for n in range(sizes.minutes):
        minute = int(now) // 60 * 60 - 60 * (n // 100 + 1)
        yield {"deployment_id": id_of("d", n % 100), "minute": minute, "data": b"\x90"}

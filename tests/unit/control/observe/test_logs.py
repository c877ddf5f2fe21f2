"""Log lines are found by their ids, in order, within bounds, and never another team's."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfloop.control.observe import logs, worker_output
from selfloop.control.observe.logs import LOG_FILE, LogFile, LogQuery, read
from selfloop.types.logline import JsonFormatter, LogLine, Scope, bound, decoder


def line(at_ms: int, message: str = "m", level: str = "INFO", **ids: str) -> str:
    return json.dumps({"at_ns": at_ms * 1_000_000, "level": level, "logger": "x", "message": message, **ids})


def write(folder: Path, *lines: str, number: int = 0) -> None:
    path = folder / (LOG_FILE if number == 0 else f"{LOG_FILE}.{number}")
    path.write_text("".join(text + "\n" for text in lines))


def query(*ids: str, start: int = 0, end: int = 10_000, **more: object) -> LogQuery:
    return LogQuery(frozenset(ids), "ours", start, end, **more)  # type: ignore[arg-type]


def messages(found: list[LogLine]) -> list[str]:
    return [line.message for line in found]


def test_lines_are_found_by_their_ids_and_never_another_teams(tmp_path: Path):
    write(
        tmp_path,
        line(1, "deployment", deployment_id="dep"),
        line(2, "run", run_id="run", team_id="ours"),
        line(3, "theirs", run_id="run", team_id="theirs"),
        line(4, "other", run_id="other", team_id="ours"),
        line(5, "mentions run and dep", run_id="else"),
        line(6, "nobody's"),
    )
    assert messages(read(tmp_path, query("dep", "run"))) == ["run", "deployment"]
    assert messages(read(tmp_path, query("dep", "run", newest_first=False))) == ["deployment", "run"]
    assert read(tmp_path, query("absent")) == []


def test_a_workers_own_events_are_shown_from_when_the_capacity_was_made(tmp_path: Path):
    write(
        tmp_path,
        line(1, "before", model="a/b"),
        line(2, "ready", model="a/b"),
        line(3, "somebody's run", model="a/b", run_id="theirs"),
        line(4, "another model's", model="a/c"),
    )
    assert messages(read(tmp_path, query("dep", model="a/b", model_since_ms=2))) == ["ready"]


def test_the_window_the_order_and_the_limit(tmp_path: Path):
    write(tmp_path, *(line(at, str(at), run_id="run") for at in range(1, 101)))
    assert messages(read(tmp_path, query("run", start=40, end=60, limit=3))) == ["60", "59", "58"]
    assert messages(read(tmp_path, query("run", start=40, end=60, limit=3, newest_first=False))) == ["40", "41", "42"]
    assert len(read(tmp_path, query("run", start=40, end=60))) == 21


def test_levels_and_substrings(tmp_path: Path):
    write(
        tmp_path,
        line(1, "a x", "DEBUG", run_id="run"),
        line(2, "b x", "WARNING", run_id="run", operation_id="op"),
        line(3, "c y", "ERROR", run_id="run"),
        line(4, "d x", "", run_id="run"),
    )
    assert messages(read(tmp_path, query("run"))) == ["d x", "c y", "b x", "a x"]
    assert messages(read(tmp_path, query("run", min_level="WARNING"))) == ["c y", "b x"]
    assert messages(read(tmp_path, query("run", min_level="DEBUG"))) == ["c y", "b x", "a x"]
    assert messages(read(tmp_path, query("run", request_id="op"))) == ["b x"]
    assert messages(read(tmp_path, query("run", includes=["x"], excludes=["b"]))) == ["d x", "a x"]


def test_rotated_files_are_read_as_one_log(tmp_path: Path):
    write(tmp_path, line(1, "oldest", run_id="run"), number=2)
    write(tmp_path, line(2, "middle", run_id="run"), number=1)
    write(tmp_path, line(3, "newest", run_id="run"))
    assert messages(read(tmp_path, query("run"))) == ["newest", "middle", "oldest"]
    assert messages(read(tmp_path, query("run", newest_first=False, limit=2))) == ["oldest", "middle"]


def test_lines_across_blocks_and_a_broken_last_line(tmp_path: Path):
    lines = [line(at, f"{at} " + "x" * 5000, run_id="run") for at in range(1, 101)]
    write(tmp_path, *lines)
    with open(tmp_path / LOG_FILE, "ab") as file:
        file.write(lines[0][:200].encode())
    found = read(tmp_path, query("run", limit=1000))
    assert [int(m.split()[0]) for m in messages(found)] == list(range(100, 0, -1))


def test_old_files_are_removed(tmp_path: Path):
    write(tmp_path, line(1), number=1)
    write(tmp_path, line(2), number=2)
    write(tmp_path, line(3))
    os.utime(tmp_path / f"{LOG_FILE}.2", (1000, 1000))
    logs.prune(tmp_path, 2000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG_FILE, f"{LOG_FILE}.1"]


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[LogFile]:
    handler = LogFile(tmp_path)
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)
    handler.close()


def test_a_record_carries_the_ids_of_its_scope_and_its_own(tmp_path: Path, log_file: LogFile):
    log = logging.getLogger("selfloop.test")
    with bound(Scope(team_id="ours", key_id="secret", run_id="run")):
        log.warning("%d %s", 1, "thing", extra={"operation_id": "op", "details": {"seconds": 0.5}})
    try:
        raise ValueError("the cause")
    except ValueError:
        log.exception("it failed")
    logs.flush()
    first, second = ((tmp_path / LOG_FILE).read_bytes()).splitlines()
    known = decoder.decode(first)
    assert (known.message, known.level) == ("1 thing", "WARNING")
    assert (known.team_id, known.run_id, known.operation_id) == ("ours", "run", "op")
    assert known.details == {"seconds": 0.5}
    assert b"secret" not in first
    assert decoder.decode(second).text.startswith("it failed\nTraceback")
    assert decoder.decode(second).text.endswith("ValueError: the cause")


def test_a_full_disk_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    handler = LogFile(tmp_path)
    for text in ("one", "two", "three"):
        handler.handle(logging.makeLogRecord({"msg": text}))
        handler.flush()
    handler.close()
    assert [record.message for record in caplog.records] == [
        f"lines of the log cannot be written to {tmp_path / LOG_FILE}: [Errno 28] No space left on device"
    ]
    assert "Traceback" not in capfd.readouterr().err


def test_the_file_is_rotated_by_size(tmp_path: Path, log_file: LogFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log_file._target, "maxBytes", 4000)
    for number in range(200):
        logging.getLogger("selfloop.test").warning("%d %s", number, "x" * 100, extra={"run_id": "run"})
        log_file.flush()
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == logs._NUM_BACKUPS + 1
    assert messages(read(tmp_path, query("run", end=2**53)))[0].startswith("199 ")


def test_a_workers_tail_leaves_out_what_is_about_other_runs(tmp_path: Path):
    path = tmp_path / "worker.log"
    formatter = JsonFormatter()
    record = logging.LogRecord("w", logging.ERROR, "f", 1, "call failed", (), None)
    ours, theirs = [], []
    for run_id, into in (("ours", ours), ("theirs", theirs)):
        with bound(Scope(run_id=run_id)):
            into.append(formatter.format(record))
    path.write_text("\n".join(["of an earlier process", "terminate called", *ours, *theirs, "{not json"]) + "\n")
    since = len("of an earlier process\n")
    assert worker_output.tail(path, since_byte=since, num_lines=10) == ["terminate called", "{not json"]
    assert worker_output.tail(path, since_byte=since, num_lines=10, runs=["ours"]) == [
        "terminate called",
        "ERROR w: call failed",
        "{not json",
    ]
    assert worker_output.tail(path, num_lines=1) == ["{not json"]
    assert worker_output.tail(tmp_path / "absent", num_lines=1) == []

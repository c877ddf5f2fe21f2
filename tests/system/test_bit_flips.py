"""Random bits flip in every file of a data directory: nothing is trained on, sampled from or given out that changed.

``make bit-flips`` does it ten thousand times (``BIT_FLIPS``); here are a few.
"""

import asyncio
import itertools
import os
import random
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

import bit_flips
import stores
from gateway import Gateway, Json, Run, copy_data, datum, ok, until, words
from selfloop.engine.engine import Engine
from selfloop.types.settings import EngineLimits

NUM_FLIPS = int(os.environ.get("BIT_FLIPS", "60"))
NUM_ON_SERVER = int(os.environ.get("BIT_FLIPS_ON_SERVER", "12"))
SEED = int(os.environ.get("BIT_FLIPS_SEED", "0"))

pytestmark = pytest.mark.skipif(stores.ON_SERVERS, reason="it is about the files of a data directory")


def large(seed: int) -> list[Json]:
    """Payload and result are files."""
    return [datum(words(seed + i, 60)) for i in range(40)]


def trained(own: Gateway) -> Run:
    """A run with two snapshots, operations after them in rows and files, and checkpoints of both kinds."""
    run = Run.create(own.http(), seed=5).attached()
    for seed in (1, 2, 3):
        run.train(seed)
        run.forward_backward(large(seed))
    run.save("kept")
    run.save("served", "save_weights_for_sampler")
    seeds = itertools.count(10)

    def has_two() -> bool:
        """However little of the work's time an operation takes on this machine."""
        if len(list(own.data_dir.glob("snapshots/*/*/run.safetensors"))) == 2:
            return True
        run.train(next(seeds))
        return False

    until(has_two, "there are two snapshots")
    run.forward_backward(large(7))
    return run


def test_no_flipped_bit_is_used(new_gateway: Callable[..., Gateway], tiny_model_folder: Path, tmp_path: Path):
    own = new_gateway("--snapshot-every", "0.1")
    trained(own)
    own.kill()
    data = copy_data(own.data_dir, tmp_path / "flipped")
    with closing(sqlite3.connect(data / "selfloop.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for left in ("selfloop.db-wal", "selfloop.db-shm"):
        (data / left).unlink(missing_ok=True)
    engine = Engine.load(tiny_model_folder, device="cpu", dtype="float32", limits=EngineLimits(max_kv_tokens=512))

    tally = asyncio.run(bit_flips.flip_and_read(data, engine, NUM_FLIPS, SEED))
    print(f"\n{NUM_FLIPS} flips\n{tally}")
    assert tally.wrong == []
    assert not any("unforeseen" in error for error in tally.errors), tally.errors


def test_no_flipped_bit_is_used_by_a_server(new_gateway: Callable[..., Gateway]):
    own = new_gateway("--snapshot-every", "0.1")
    run = trained(own)
    other = Run.create(own.http(), seed=6).attached()
    paths: dict[str, str] = {}
    for uri in (f"bt://loops:{run.id}/weights/kept", f"bt://loops:{run.id}/sampler_weights/served"):
        (found,) = ok(run.http.get("/v1/loops/checkpoints", params={"checkpoint_path": uri}))["checkpoints"]
        paths[found["id"]] = uri
    expected, rng = run.logprobs(), random.Random(SEED)
    ends = {"refused": 0, "equal": 0}
    for _ in range(NUM_ON_SERVER):
        # Payloads go as soon as both snapshots have them.
        files = {root: bit_flips.files_of(own.data_dir / root) for root in ("checkpoints", "snapshots", "journal")}
        root = rng.choice([root for root, found in files.items() if found])
        path = rng.choice(files[root])
        content = path.read_bytes()
        bit = rng.randrange(len(content) * 8)
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        where = f"bit {bit} of {path.relative_to(own.data_dir)}"
        if root == "checkpoints":
            outcome = other.outcome(other.submit("load_state", path=paths[path.parent.name]))
            assert outcome.get("error_class") == "CheckpointDamaged", where
            assert path.name in outcome["error"]
            ends["refused"] += 1
        else:
            # None where it has died so often within a minute that the next use starts it.
            for pid in own.worker_pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            outcome = run.outcome(run.submit("forward", data=[datum(words(99))], loss_fn="cross_entropy"))
            if outcome["status"] == "done":
                assert outcome["result"]["loss_fn_outputs"][0]["logprobs"]["data"] == expected, where
                ends["equal"] += 1
            else:
                assert outcome["error_class"] == "RecoveryFailed", where
                ends["refused"] += 1
        if path.exists():
            path.write_bytes(content)
    print(f"\n{NUM_ON_SERVER} flips under a server: {ends}")
    assert run.logprobs() == expected

"""Make the data directory of a release, to be kept here and started by every version after it.

    python tests/data_directories/make.py 0.2.0

writes ``0.2.0.tar.xz`` beside this file: a server's data directory as ``kill -9`` left it, with its model, and what is
expected of it as ``expected.json``. ``make release`` runs it once a release; nothing here is ever made again.
"""

import itertools
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gateway import KEY, MODEL, Gateway, Run, datum, ok, selfloop, until, words
from served_model import save

HERE = Path(__file__).parent
# Of the machine and the moment.
_LEFT_OUT = ("logs", "workers")


def fill(own: Gateway) -> dict[str, object]:
    """Runs with and without snapshots, checkpoints of both kinds, a sampler, and operations without an outcome."""
    http = own.http()
    long = Run.create(http, seed=5, lora_rank=4).attached()
    for seed in range(1, 6):
        long.train(seed)
    long.save("kept")
    long.save("served", "save_weights_for_sampler")
    long.forward_backward([datum(words(6))])
    seeds = itertools.count(10)

    def has_snapshot() -> bool:
        """However little of the work's time an operation takes on this machine."""
        if list(own.data_dir.glob("snapshots/*/*/run.safetensors")):
            return True
        long.train(next(seeds))
        return False

    until(has_snapshot, "there is a snapshot")
    short = Run.create(http, seed=6, lora_rank=8).attached()
    short.train(7)
    logprobs = {run.id: run.logprobs() for run in (long, short)}
    # Large enough to be a file of the journal, and ahead of its turn.
    ahead = [datum(words(8 + i, 60)) for i in range(40)]
    waiting = ok(
        short.post("forward", seq=short.seq + 2, data=ahead, loss_fn="cross_entropy", key="ahead-of-its-turn"), 202
    )
    return {
        "model": MODEL,
        "runs": [
            {"id": run.id, "seq": run.seq, "rank": run.resource["lora_rank"], "logprobs": logprobs[run.id]}
            for run in (long, short)
        ],
        "waiting": {"run": short.id, "seq": short.seq + 2, "operation": waiting["operation_id"]},
        "checkpoints": [f"bt://loops:{long.id}/weights/kept", f"bt://loops:{long.id}/sampler_weights/served"],
    }


def make(target: Path) -> None:
    """Write the archive of a data directory of the code that is installed."""
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        model = save(data_dir / "own" / "tiny")
        selfloop("models", "add", str(model), "--name", MODEL, "--data-dir", str(data_dir))
        own = Gateway(data_dir).start(KEY, "--snapshot-every", "0.1")
        try:
            expected = fill(own)
            own.kill()
        finally:
            own.close()
        for name in _LEFT_OUT:
            shutil.rmtree(data_dir / name, ignore_errors=True)
        (data_dir / "expected.json").write_text(json.dumps(expected, indent=1))
        with tarfile.open(target, "w:xz") as archive:
            archive.add(data_dir, arcname="data", filter=lambda info: info if info.isfile() or info.isdir() else None)
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    make(HERE / f"{sys.argv[1]}.tar.xz")

"""What a background snapshot takes from the training that goes on beside it.

    python -m bench.snapshots [MODEL_DIR] [--ranks 8 32] [--num 5] [--length 128]

For each rank: train a step, begin a snapshot of adapter, moments and accumulated gradients as the worker does, go on
while a thread writes it. Reports the pause of the main loop for the copy, the processor time of the thread, and the
work that the server then lets pass before the next one (``--snapshot-every``, or fifty times the cost). Pause and
thread together are what a snapshot takes; the share is of one processor's time, where training has all of them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.harness import work
from selfloop.control.queue.snapshots import MAX_SHARE
from selfloop.engine.engine import Engine
from selfloop.types.operation import AdamParams
from selfloop.types.settings import QueueSettings
from selfloop.worker.serving.background import SnapshotWriter


class Cost(NamedTuple):
    """Of one snapshot, in seconds and bytes."""

    stall_s: float
    cpu_s: float
    size_bytes: int


def costs(engine: Engine, rank: int, num: int, length: int) -> list[Cost]:
    run_id = f"rank-{rank}"
    engine.init_run(run_id, rank=rank, seed=0)
    data = [work.datum(ids) for ids in work.sequences([length, length], engine.info.vocab_size)]
    writer, found = SnapshotWriter(), list[Cost]()
    for index in range(num + 1):
        engine.forward_backward(run_id, data, "cross_entropy", {})
        if index % 2:
            engine.optim_step(run_id, AdamParams())
            engine.forward_backward(run_id, data, "cross_entropy", {})
        with tempfile.TemporaryDirectory(prefix="selfloop-bench-") as folder:
            target = Path(folder) / "snapshot"
            started = time.perf_counter()
            write = engine.begin_snapshot(run_id, target)
            writer.begin(index, write, time.perf_counter() - started)
            while (finished := writer.take_finished()) is None:
                engine.forward(run_id, data, "cross_entropy", {})
            written = finished[1].result()
            size = sum(path.stat().st_size for path in target.iterdir())
            found.append(Cost(written.stall_s, written.cpu_s, size))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--num", type=int, default=5, help="snapshots of each rank")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence; a step has two")
    args = parser.parse_args()
    if args.model_dir is None:
        from bench.harness.program import embedded_model

        args.model_dir = embedded_model()
    engine = Engine.load(args.model_dir)
    every_s = QueueSettings().snapshot_every_s
    for rank in args.ranks:
        found = costs(engine, rank, args.num, args.length)
        stall_s, cpu_s = (statistics.median(cost[i] for cost in found) for i in (0, 1))
        worst = max(cost.stall_s + cost.cpu_s for cost in found)
        interval_s = max(every_s, (stall_s + cpu_s) / MAX_SHARE)
        cost_s, size_mib = stall_s + cpu_s, found[0].size_bytes / 2**20
        print(
            f"rank {rank}: {size_mib:.0f} MiB; pause {1e3 * stall_s:.0f} ms, thread {1e3 * cpu_s:.0f} ms of a CPU "
            f"(at most {1e3 * worst:.0f} ms together); one in {interval_s:.1f} s of work: {cost_s / interval_s:.1%}"
        )


if __name__ == "__main__":
    sys.exit(main())

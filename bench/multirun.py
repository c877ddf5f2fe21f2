"""Many training runs of one base model: their rate together, and the memory that each costs.

    python -m bench.multirun [MODEL_DIR] [--cases together scaling memory] [--rounds 3] [--json FILE]

Every run has an adapter of its own, moments, and 2 sequences of 64 tokens a step: forward, backward and AdamW.
"One after the other" serves the same runs with the same engine, an operation at a time.
"""

import gc
from collections.abc import Sequence

import psutil

from bench.harness import ours, program, work
from bench.harness.measure import alternate, ratios, scaled, seconds
from bench.harness.program import Bench, Case
from selfloop.types.operation import ForwardBackward
from selfloop.types.result import LossResult

SEQUENCES, LENGTH, RANK = 2, 64, 32
MEMORY_RANK = 8
# Adapter, two moments: float32 each.
STATE_COPIES = 3
MIB = 2**20


class Runs:
    """``num`` fresh runs with data of their own."""

    def __init__(self, bench: Bench, num: int, ranks: Sequence[int]) -> None:
        self._engine = bench.engine
        self._asked: list[tuple[str, ForwardBackward]] = []
        self._length = bench.size(LENGTH)
        for i in range(num):
            run = bench.fresh_run(f"run-{i}", ranks[i % len(ranks)])
            ids = [work.random_ids(self._length + 1, bench.vocab_size, 2 * i + j) for j in range(SEQUENCES)]
            self._asked.append((run, ForwardBackward([work.datum(s) for s in ids], "cross_entropy", {})))

    @property
    def num_tokens(self) -> int:
        return len(self._asked) * SEQUENCES * self._length

    def step_together(self) -> None:
        for result in self._engine.compute(self._asked):
            assert isinstance(result, LossResult), result
        for run, _ in self._asked:
            self._engine.optim_step(run, ours.ADAM)

    def step_in_turn(self) -> None:
        for run, operation in self._asked:
            ours.train_step(self._engine, run, operation.data)

    def close(self) -> None:
        for run, _ in self._asked:
            self._engine.remove_run(run)


def compare(bench: Bench, case: str, num: int, ranks: Sequence[int], at_least: float | None = None) -> None:
    runs = Runs(bench, num, ranks)
    values = alternate(
        {
            "roof": bench.roof.gflops,
            "together": lambda: runs.num_tokens / seconds(runs.step_together),
            "in turn": lambda: runs.num_tokens / seconds(runs.step_in_turn),
        },
        bench.rounds,
    )
    runs.close()
    add = bench.report.add
    add(case, "together", "tokens/s", values["together"])
    add(case, "one after the other", "tokens/s", values["in turn"])
    add(case, "ratio", "x", ratios(values["together"], values["in turn"]), at_least=at_least)
    done = scaled(values["together"], bench.cost.train_gflop())
    add(case, "together, of the arithmetic roof", "%", scaled(ratios(done, values["roof"]), 100))


def together(bench: Bench) -> None:
    compare(bench, f"8 runs of {SEQUENCES} x {bench.size(LENGTH)}, rank {RANK}", 8, [RANK], at_least=2.0)


def scaling(bench: Bench) -> None:
    for num in (1, 4, 16, 64) if not bench.quick else (1, 2):
        compare(bench, f"runs of {SEQUENCES} x {bench.size(LENGTH)}, rank {RANK}: {num}", num, [RANK])


def ranks(bench: Bench) -> None:
    compare(bench, f"8 runs of {SEQUENCES} x {bench.size(LENGTH)}, ranks 4 to 64", 8, [4, 8, 16, 32, 64])


def memory(bench: Bench) -> None:
    """What this process grows by with the number of runs that have trained."""
    case, process = f"memory of resident runs of rank {MEMORY_RANK}", psutil.Process()
    weights = bench.cost.adapter_weights(MEMORY_RANK)
    state_mib = STATE_COPIES * 4 * weights / MIB
    bench.report.add(case, "adapter and moments of one run", "MiB", state_mib)
    _train_one(bench, "warm-up")
    bench.engine.remove_run("warm-up")
    before, num_runs = _resident(process), 0
    for num in (1, 4, 16, 64):
        while num_runs < num:
            _train_one(bench, f"run-{num_runs}")
            num_runs += 1
        grown = (_resident(process) - before) / MIB
        bench.report.add(case, f"{num} runs", "MiB", grown)
    bench.report.add(case, "64 runs, of adapters and moments", "%", 100 * grown / (64 * state_mib), at_most=120)
    for i in range(num_runs):
        bench.engine.remove_run(f"run-{i}")


def _train_one(bench: Bench, name: str) -> None:
    run = bench.fresh_run(name, MEMORY_RANK)
    ids = work.random_ids(bench.size(LENGTH) + 1, bench.vocab_size, 0)
    ours.train_step(bench.engine, run, [work.datum(ids)])


def _resident(process: psutil.Process) -> int:
    gc.collect()
    return process.memory_info().rss


CASES: dict[str, Case] = {"together": together, "scaling": scaling, "ranks": ranks, "memory": memory}


def main(arguments: Sequence[str] | None = None) -> None:
    program.run("multirun", __doc__, CASES, arguments)


if __name__ == "__main__":
    main()

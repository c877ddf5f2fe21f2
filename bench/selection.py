"""What matters most, in about five minutes of two quiet cores: one table with targets and verdicts.

    python -m bench.selection [MODEL_DIR] [--rounds 2] [--json FILE]      (also: make bench)

The programs themselves have more cases and say what is measured: ``python -m bench.train --help`` and so on.
"""

from collections.abc import Sequence

from bench import multirun, rl_loop, sample, served, train
from bench.harness import program
from bench.harness.program import Case

CASES: tuple[Case, ...] = (
    *(train.CASES[name] for name in ("full", "quarter", "mixed")),
    *(sample.CASES[name] for name in ("decode1", "decode8", "decode32", "adapters", "sharing", "prefix", "gap")),
    *(multirun.CASES[name] for name in ("together", "memory")),
    rl_loop.CASES["grpo"],
    *(served.CASES[name] for name in ("train", "sample", "share")),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = program.parser(__doc__)
    options.set_defaults(rounds=2)
    program.measure("selection", CASES, options.parse_args(arguments), arguments)


if __name__ == "__main__":
    main()

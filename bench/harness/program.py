"""What every program of the benchmarks is: options, the two sides, cases by name, a report."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.harness import ours, theirs
from bench.harness.measure import use_clock
from bench.harness.report import Report, machine
from bench.harness.roof import ModelCost, Roof
from selfloop.engine.engine import Engine

_QUICK_DIVISOR = 16


class Bench:
    """One model on one machine, with what cases share made at first need.

    Args:
        quick: everything tiny, to see that the programs run; the figures mean nothing then.
    """

    def __init__(
        self,
        model_dir: Path,
        report: Report,
        *,
        dtype: str = "auto",
        device: str = "auto",
        rounds: int = 3,
        quick: bool = False,
    ) -> None:
        self.model_dir = model_dir
        self.report = report
        self.rounds = 1 if quick else rounds
        self.quick = quick
        self._dtype, self._device = dtype, device

    @cached_property
    def engine(self) -> Engine:
        return ours.load(self.model_dir, self._dtype, self._device)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.engine.info.dtype)

    @property
    def device(self) -> str:
        return self.engine.info.device

    @property
    def vocab_size(self) -> int:
        return self.engine.info.vocab_size

    @cached_property
    def cost(self) -> ModelCost:
        return ModelCost.read(self.model_dir)

    @cached_property
    def roof(self) -> Roof:
        return Roof(self.dtype, torch.device(self.device), seconds=0.01 if self.quick else 0.4)

    @cached_property
    def base(self) -> Any:
        """The plain model of transformers."""
        return theirs.load_base(self.model_dir, self.dtype, self.device)

    def peft(self, rank: int, *, autocast_adapter: bool = True) -> theirs.PeftTrainer:
        """The model with a fresh adapter; only the last one asked for is kept."""
        wanted = (rank, autocast_adapter)
        if self._peft is None or self._peft[0] != wanted:
            self._peft = None
            trainer = theirs.PeftTrainer(
                self.model_dir, self.dtype, self.device, rank, autocast_adapter=autocast_adapter
            )
            self._peft = (wanted, trainer)
        return self._peft[1]

    _peft: tuple[tuple[int, bool], theirs.PeftTrainer] | None = None

    def fresh_run(self, name: str, rank: int) -> str:
        """A new adapter of that rank in the engine."""
        self.engine.init_run(name, rank=rank, seed=0)
        return name

    def size(self, num: int, least: int = 2) -> int:
        """``num``, or a small part of it when quick."""
        return max(least, num // _QUICK_DIVISOR) if self.quick else num


Case = Callable[[Bench], None]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every program on a model has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model_dir", type=Path, nargs="?", help="a Hugging Face folder; default: the embedded model")
    made.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    made.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU time over threads, for a busy machine"
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return made


def run(program: str, description: str | None, cases: Mapping[str, Case], arguments: Sequence[str] | None) -> Report:
    """Parse the arguments, run the cases that are asked for, print the table."""
    options = parser(description)
    options.add_argument(
        "--cases", nargs="+", choices=list(cases), default=list(cases), metavar="CASE", help=", ".join(cases)
    )
    args = options.parse_args(arguments)
    return measure(program, [cases[name] for name in args.cases], args, arguments)


def measure(program: str, cases: Sequence[Case], args: argparse.Namespace, arguments: Sequence[str] | None) -> Report:
    """Run these cases on one :class:`Bench` as the options say; print the table."""
    model_dir = args.model_dir or embedded_model()
    use_clock(args.clock)
    report = Report(program, machine(), judged=not args.quick)
    bench = Bench(model_dir, report, dtype=args.dtype, device=args.device, rounds=args.rounds, quick=args.quick)
    report.about |= {"model": model_dir.name, "dtype": bench.engine.info.dtype, "device": bench.device}
    report.about["clock"] = args.clock
    given = sys.argv[1:] if arguments is None else arguments
    report.about["command"] = shlex.join(["python", "-m", f"bench.{program}", *given])
    for case in cases:
        case(bench)
    if args.json is not None:
        report.write(args.json)
    print(report.render())
    return report


def embedded_model() -> Path:
    """The model that Selfloop brings along, prepared at the first use."""
    folder = Path(__file__).parents[2] / "build" / "bench" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        command = [sys.executable, "-m", "selfloop.convert.prepare", "embedded", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder

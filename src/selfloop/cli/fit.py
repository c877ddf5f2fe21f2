"""``selfloop models fit``: what base models take of a device, asked of the engine in a process of its own."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import msgspec
import typer
from rich.console import Console

from selfloop.cli import local
from selfloop.control.queue.run_memory import bytes_open, needed
from selfloop.types.errors import OperationFailed
from selfloop.types.fit import Fit, FitAnswer, PassPlan

_FLOAT_BYTES = 4
_WIDTH, _NAME_WIDTH = 80, 22


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every model; the options of the command."""

    device: str
    dtype: str
    base_dtype: str
    memory_bytes: int | None
    rank: int
    context: int | None
    activation_bytes: int | None = None
    max_kv_tokens: int | None = None

    @property
    def arguments(self) -> list[str]:
        words = ["--device", self.device, "--dtype", self.dtype, "--base-dtype", self.base_dtype]
        words += ["--rank", str(self.rank)]
        given = {
            "--memory-bytes": self.memory_bytes,
            "--context": self.context,
            "--activation-bytes": self.activation_bytes,
            "--max-kv-tokens": self.max_kv_tokens,
        }
        return words + [word for name, value in given.items() if value is not None for word in (name, str(value))]


class RunPlan(msgspec.Struct, frozen=True):
    """Memory of one run, in bytes.

    Args:
        adapter_bytes: its trained numbers in float32.
        open_bytes: adapter, gradient, two moments and a published copy.
        needed_bytes: with what a snapshot and a step take beside them.
        num_open: how many such runs fit at a time; None where only the loaded model tells.
    """

    adapter_bytes: int
    open_bytes: int
    needed_bytes: int
    num_open: int | None


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is printed of a model as JSON."""

    model: str
    fits: bool | None = None
    error: str = ""
    run: RunPlan | None = None
    fit: Fit | None = None


def show_fits(model: str | None, question: Question, data_dir: Path | None, *, as_json: bool) -> bool:
    """Print them; False where the one that is asked for does not fit, or cannot be read.

    Raises:
        OperationFailed: the engine does not start.
    """
    names = _paths(model, data_dir)
    there = {name: path for name, path in names.items() if isinstance(path, Path)}
    answers = dict(zip(there, _ask(list(there.values()), question), strict=True)) if there else {}
    said: list[Said] = []
    for name, path in names.items():
        answer = answers[name] if isinstance(path, Path) else FitAnswer(error=path)
        said.append(_said(name, answer, question))
    if as_json:
        for each in said:
            typer.echo(msgspec.json.encode(each).decode())
    elif model is None:
        _show_table(said)
    else:
        _print_one(said[0])
    return model is None or (said[0].fits is not False and not said[0].error)


def _paths(model: str | None, data_dir: Path | None) -> dict[str, Path | str]:
    """Where each asked model lies, by name; a text says why that is not known."""
    if model is not None and Path(model).expanduser().exists():
        return {model: Path(model).expanduser()}

    async def work() -> dict[str, Path | str]:
        async with local.opened(data_dir) as data:
            if model is not None:
                found = await data.catalogue.resolve(model, "model")
                return {model: found.path or "its files are prepared at first use"}
            rows, _ = await data.catalogue.entries()
            paths = {row.name: await data.catalogue.stored_folder(row.name) for row in rows}
            return {name: path or "its files are prepared at first use" for name, path in paths.items()}

    return local.run(work)


def _ask(paths: list[Path], question: Question) -> list[FitAnswer]:
    # In a process of its own: the command line itself never loads torch.
    command = [sys.executable, "-m", "selfloop.engine.fit", *map(str, paths), *question.arguments]
    with Console(stderr=True).status("Planning"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or len(lines) != len(paths):
        reason = (done.stderr.strip().splitlines() or ["it ended without an answer"])[-1]
        raise OperationFailed(f"the engine cannot plan: {reason}")
    return [msgspec.json.decode(line, type=FitAnswer) for line in lines]


def _said(name: str, answer: FitAnswer, question: Question) -> Said:
    found = answer.fit
    if found is None:
        return Said(name, error=answer.error)
    num_bytes = bytes_open(found.adapter_parameters)
    limit = None if found.plan is None else found.plan.run_limit_bytes
    # Each further run takes what it holds open; what a snapshot takes is there once.
    once = needed([num_bytes]) - num_bytes
    num_open = None if limit is None or num_bytes == 0 else max(0, (limit - once) // num_bytes)
    run = RunPlan(_FLOAT_BYTES * found.adapter_parameters, num_bytes, needed([num_bytes]), num_open)
    return Said(name, _fits(found, run, question.context), run=run, fit=found)


def _fits(found: Fit, run: RunPlan, context: int | None) -> bool | None:
    plan = found.plan
    if found.weights_bytes > found.memory_bytes:
        return False
    if plan is None:
        return None
    trains = plan.longest_trained >= (1 if context is None else context)
    return trains and _has_room_for_cache(found, plan) and run.num_open != 0


def _has_room_for_cache(found: Fit, plan: PassPlan) -> bool:
    return plan.weights_bytes + plan.cache_bytes <= found.memory_bytes


def _print_one(said: Said) -> None:
    found, run = said.fit, said.run
    if found is None or run is None:
        local.complain(f"{said.model}: {said.error}")
        return
    verdict = {True: "fits", False: "does not fit", None: "may fit: only the loaded model tells what a pass takes"}
    typer.echo(f"{said.model}: {verdict[said.fits]}")
    typer.echo("")
    for name, value in _lines(found, run):
        for number, part in enumerate(textwrap.wrap(value, _WIDTH - _NAME_WIDTH - 3)):
            typer.echo(f"  {'' if number else name:<{_NAME_WIDTH}} {part}")
    for advice in [] if found.plan is None else _advice(found, found.plan):
        typer.echo("\n" + textwrap.fill(advice, _WIDTH))


def _lines(found: Fit, run: RunPlan) -> list[tuple[str, str]]:
    stored = "no weight files" if found.stored_bytes is None else f"{_size(found.stored_bytes)} stored"
    made_from = f", made from {found.quantization}" if found.quantization else ""
    kept = f" in {found.base_dtype}" if found.base_dtype != "auto" else ""
    lines = [
        ("device", f"{found.device}, {_size(found.memory_bytes)}"),
        ("computed by", f"{found.backend}, in {found.dtype}"),
        *((f"  not {name}", reason) for name, reason in found.passed_over.items()),
        ("model", f"{found.model_type}, {found.num_parameters / 1e9:.2f}B parameters, {stored}"),
        ("base weights", _size(found.weights_bytes) + kept + _laid_out(found) + made_from),
        ("adapters on", ", ".join(found.adapted) or "nothing: it can only be sampled"),
    ]
    if found.frozen > 0:
        lines.append(("  without", f"{found.frozen:.0%} of the layers' weights take no adapter"))
    lines += [
        (f"one run, rank {found.rank}", f"{_size(run.needed_bytes)} ({_size(run.open_bytes)} for each further run)"),
        ("  adapter", f"{_size(run.adapter_bytes)}; gradient, two moments, published copy too"),
        ("  beside", f"{_size(run.needed_bytes - run.open_bytes)}: a snapshot's copy, a scaled gradient"),
    ]
    return lines + ([] if found.plan is None else _plan_lines(found, found.plan, run))


def _plan_lines(found: Fit, plan: PassPlan, run: RunPlan) -> list[tuple[str, str]]:
    way = "kept" if plan.pass_tokens <= plan.longest_kept else "computed twice"
    return [
        ("runs at a time", f"{run.num_open} in {_size(plan.run_limit_bytes)}; more take turns"),
        ("KV cache", f"{_size(plan.cache_bytes)}, {plan.cache_tokens:,} tokens"),
        ("one training pass", f"{_size(plan.pass_bytes)} for {plan.pass_tokens:,} tokens, layers {way}"),
        ("  at most", f"{_size(plan.pass_limit_bytes)}, and {_size(plan.kept_limit_bytes)} kept between passes"),
        ("longest that trains", f"{plan.longest_trained:,} of {found.context:,} tokens"),
        ("longest that samples", f"{plan.longest_sampled:,} of {found.context:,} tokens"),
    ]


def _advice(found: Fit, plan: PassPlan) -> list[str]:
    """Which options of ``serve`` help."""
    lines: list[str] = []
    if plan.weights_bytes > found.memory_bytes:
        return lines
    if plan.least_pass_bytes > plan.pass_limit_bytes:
        lines.append(f"A pass takes {_size(plan.least_pass_bytes)} at least: give it more (--activation-memory).")
    if not _has_room_for_cache(found, plan) and plan.longest_sampled > 0:
        lines.append(f"The KV cache has no room beside the weights: limit it (--max-kv-tokens {plan.longest_sampled}).")
    return lines


def _laid_out(found: Fit) -> str:
    if found.plan is None or found.plan.weights_bytes == found.weights_bytes:
        return ""
    return f", {_size(found.plan.weights_bytes)} as laid out for training"


def _show_table(said: list[Said]) -> None:
    table = local.table("model", "fits", "weights", "one run", "trains", "samples")
    for each in said:
        if each.fit is None or each.run is None:
            table.add_row(each.model, "?")
            continue
        plan = each.fit.plan
        tokens = ("?", "?") if plan is None else (f"{plan.longest_trained:,}", f"{plan.longest_sampled:,}")
        sizes = (_size(each.fit.weights_bytes), _size(each.run.needed_bytes))
        table.add_row(each.model, {True: "yes", False: "no", None: "?"}[each.fits], *sizes, *tokens)
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    for each in said:
        if each.error:
            local.complain(f"{each.model}: {each.error}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"

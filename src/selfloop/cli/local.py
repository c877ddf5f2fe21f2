"""Commands that work on a data directory itself, beside a running server or without one."""

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from selfloop.cli.options import CONFIG_ENV
from selfloop.control.data_dir.transient_errors import TRANSIENT_ERRORS, not_ready
from selfloop.control.gateway import DataDirectory
from selfloop.types import option_values
from selfloop.types.errors import BadRequest, SelfloopError
from selfloop.types.option_sources import read_sources
from selfloop.types.options import leaves
from selfloop.types.settings import Settings

T = TypeVar("T")

_PIPE_WIDTH = 400
_LINE_INTERVAL_S = 5.0
# With the longest stage and the two columns behind it 80 wide.
_BAR_WIDTH = 20

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="The data directory. Default: $SELFLOOP_DATA_DIR or ~/.selfloop.")
]


def given(key: str) -> Any:
    """The value of an option of ``serve`` for the other commands: the environment's, or the configuration file's."""
    leaf = next(leaf for leaf in leaves(Settings) if leaf.key == key)
    file = os.environ.get(CONFIG_ENV)
    try:
        here = {leaf.env: os.environ.get(leaf.env, "")}
        found = read_sources(leaves(Settings), {}, here, Path(file) if file else None)
    except BadRequest as error:
        complain(str(error))
        raise typer.Exit(2) from None
    return found[key].value if key in found else leaf.default


def resolve(data_dir: Path | None) -> Path:
    return (data_dir or cast(Path, given("data_dir"))).expanduser().resolve()


def table(*columns: str) -> Table:
    """A table whose cells are folded rather than cut short."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def show(made: Table) -> None:
    """Print a table; to a file or a pipe with every row on one line."""
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(made)


def complain(message: str) -> None:
    """One red line on standard error, in whatever width."""
    Console(stderr=True).print(Text(message, style="red"), soft_wrap=True)


@contextmanager
def failing_in_one_line() -> Generator[None]:
    """What the user can mend is one red line and exit status 1."""
    try:
        yield
    except SelfloopError as error:
        complain(str(error))
        raise typer.Exit(1) from None
    except TRANSIENT_ERRORS as error:
        if not_ready(error) is None:
            raise
        cause = error.strerror if isinstance(error, OSError) else getattr(error, "orig", error)
        complain(f"the data directory cannot be used now: {cause}")
        raise typer.Exit(1) from None


def run(work: Callable[[], Coroutine[None, None, T]]) -> T:
    """Run a command's work."""
    with failing_in_one_line():
        return asyncio.run(work())


def duration_s(option: str, duration: str) -> int:
    """``7d`` in seconds."""
    matched = re.fullmatch(r"(\d{1,9})([smhd])", duration)
    if matched is None:
        raise typer.BadParameter("a number with s, m, h or d, e.g. 7d", param_hint=option)
    return int(matched[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[matched[2]]


def size_bytes(option: str, size: str | None) -> int | None:
    """``24GiB`` in bytes; None where it is not given."""
    kind = option_values.size()
    try:
        return None if size is None else kind.parse(size)
    except ValueError:
        raise typer.BadParameter(kind.words, param_hint=option) from None


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


@contextmanager
def progress() -> Generator[Callable[[str, float], None]]:
    """A bar on standard error for the length of a block; called with a stage and the fraction that is done.

    Where that is no terminal, a download is a line every few seconds.
    """
    columns = (TextColumn("{task.description}"), BarColumn(_BAR_WIDTH), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _download_lines()
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("looking", total=1.0)
        yield lambda stage, part: bar.update(task, description=stage, completed=part)


def _download_lines() -> Callable[[str, float], None]:
    told = time.monotonic()

    def tell(stage: str, part: float) -> None:
        nonlocal told
        if stage.startswith("download ") and time.monotonic() - told >= _LINE_INTERVAL_S:
            told = time.monotonic()
            typer.echo(f"{part:4.0%} {stage}", err=True)

    return tell


@asynccontextmanager
async def opened(data_dir: Path | None) -> AsyncGenerator[DataDirectory]:
    """The data directory's rows, for the length of a block."""
    # What is made here is for its user alone; what the command then writes elsewhere is as the user likes it.
    usual = os.umask(0o077)
    try:
        data = DataDirectory(resolve(data_dir), given("database_url"), given("store"))
        try:
            await data.seed()
            os.umask(usual)
            yield data
        finally:
            await data.close()
    finally:
        os.umask(usual)

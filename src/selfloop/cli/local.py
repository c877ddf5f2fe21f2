"""Commands that work on a data directory itself, beside a running server or without one."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from selfloop.control.control import DataDirectory
from selfloop.server.settings import default_data_dir
from selfloop.types.errors import SelfloopError

T = TypeVar("T")

_PIPE_WIDTH = 400

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="The data directory. Default: $SELFLOOP_DATA_DIR or ~/.selfloop.")
]


def resolve(data_dir: Path | None) -> Path:
    return (data_dir or default_data_dir()).expanduser().resolve()


def table(*columns: str) -> Table:
    """A table whose cells are folded rather than cut short."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def show(made: Table) -> None:
    """Print a table; to a file or a pipe with every row on one line."""
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(made)


def run(work: Callable[[], Coroutine[None, None, T]]) -> T:
    """Run a command's work; an error is one red line and exit status 1."""
    try:
        return asyncio.run(work())
    except SelfloopError as error:
        Console(stderr=True).print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None


@asynccontextmanager
async def opened(data_dir: Path | None) -> AsyncGenerator[DataDirectory]:
    """The data directory's rows, for the length of a block."""
    data = DataDirectory(resolve(data_dir))
    try:
        await data.seed()
        yield data
    finally:
        await data.close()

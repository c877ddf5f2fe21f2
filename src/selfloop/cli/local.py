"""Commands that work on a data directory itself, beside a running server or without one."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from selfloop.control.control import DataDirectory
from selfloop.server.settings import default_data_dir
from selfloop.types.errors import SelfloopError

T = TypeVar("T")

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="The data directory. Default: $SELFLOOP_DATA_DIR or ~/.selfloop.")
]


def resolve(data_dir: Path | None) -> Path:
    return (data_dir or default_data_dir()).expanduser().resolve()


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
        yield data
    finally:
        await data.close()

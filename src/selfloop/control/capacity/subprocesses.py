"""Programs that do heavy work in a process of their own and report it in JSON lines on their stdout."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from selfloop.types.errors import OperationFailed

log = logging.getLogger(__name__)


class _Line(msgspec.Struct):
    stage: str = ""
    fraction: float = 0.0
    error: str = ""
    facts: msgspec.Raw = msgspec.Raw(b"null")


async def run_subprocess(process: asyncio.subprocess.Process, on_progress: Callable[[str, float], None]) -> msgspec.Raw:
    """Follow a program to its end; returns the ``facts`` of its last line.

    Raises:
        OperationFailed: it failed; the text is the error that it gave, or else the last it said.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    cause = ""
    facts = msgspec.Raw(b"null")
    try:
        async for line in process.stdout:
            progress = msgspec.json.decode(line, type=_Line)
            cause = progress.error or cause
            facts = progress.facts.copy()
            if progress.stage:
                on_progress(progress.stage, progress.fraction)
        code = await process.wait()
    except BaseException:
        await _stop(process)
        errors.cancel()
        raise
    said = (await errors).decode(errors="replace").strip()
    if code != 0:
        log.info("a program failed: %s\n%s", cause, said)
        raise OperationFailed(cause or (said.splitlines()[-1] if said else f"exit status {code}"))
    return facts


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()

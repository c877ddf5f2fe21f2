"""Start conversions of models and adapters on this machine, as processes of their own."""

import asyncio
import sys
from collections.abc import Sequence

from selfloop.worker.launchers.processes import child_environment

_HUB_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")


async def launch_prepare(*arguments: str) -> asyncio.subprocess.Process:
    """Launch the program that turns a model source into a served folder; progress on its stdout."""
    return await _launch_subprocess("selfloop.convert.prepare", *arguments, keep=_HUB_SECRETS)


async def launch_adapters(*arguments: str) -> asyncio.subprocess.Process:
    """Launch the program that takes adapters out of checkpoints and into them; progress on its stdout."""
    return await _launch_subprocess("selfloop.convert.adapters", *arguments)


async def _launch_subprocess(module: str, *arguments: str, keep: Sequence[str] = ()) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=child_environment(keep),
    )

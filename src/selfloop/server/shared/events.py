"""Server-sent events of an answer that grows, and several answers grown side by side."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

import msgspec

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
# Readers that split text into lines by Unicode's rules would break a frame here.
_LINE_BREAKS = {"\u0085": b"\\u0085", "\u2028": b"\\u2028", "\u2029": b"\\u2029"}


def frame(data: object, event: str | None = None) -> bytes:
    """One event, with its name where it has one: JSON on a single line, whatever a reader takes for a line break."""
    encoded = msgspec.json.encode(data)
    for character, escape in _LINE_BREAKS.items():
        encoded = encoded.replace(character.encode(), escape)
    named = b"" if event is None else b"event: " + event.encode() + b"\n"
    return named + b"data: " + encoded + b"\n\n"


async def merged(sources: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Events of all sources with their source's place, as they come. The first error ends them all."""
    events: asyncio.Queue[tuple[int, T] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(place: int, source: AsyncGenerator[T]) -> None:
        async with contextlib.aclosing(source):
            async for event in source:
                events.put_nowait((place, event))

    tasks = [asyncio.create_task(pump(place, source)) for place, source in enumerate(sources)]
    for task in tasks:
        task.add_done_callback(events.put_nowait)
    try:
        num_running = len(tasks)
        while num_running:
            event = await events.get()
            if isinstance(event, tuple):
                yield event
            else:
                event.result()
                num_running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

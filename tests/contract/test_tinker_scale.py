"""Thousands of samples of one client under way at a time."""

import asyncio
from collections.abc import Callable

import httpx
import psutil
from test_tinker import Wire
from test_tinker_sampling import base_sampler

from gateway import KEY, Gateway, words

NUM = 2000
# A sample under way takes its prompt, its row and its answer: 17 KiB is the most that was seen.
MAX_GROWTH_BYTES = NUM * 25 * 1024


async def sample_all(url: str, sampler: str) -> list[int]:
    """Post everything at once, poll for all of it, fetch what ended; returns the sizes of the results."""
    # The client's pool is slow when many wait for a connection of it.
    turn = asyncio.Semaphore(100)
    headers = {"X-API-Key": f"tml-{KEY}"}
    prompt = {"chunks": [{"type": "encoded_text", "tokens": words(1)}]}
    fields = {"sampling_session_id": sampler, "prompt": prompt, "sampling_params": {"max_tokens": 2, "stop": []}}
    sizes: list[int] = []
    async with httpx.AsyncClient(base_url=url + "/api/v1", headers=headers, timeout=60) as client:

        async def post(route: str, **body: object) -> httpx.Response:
            async with turn:
                response = await client.post(route, json=body)
            assert response.status_code == 200, response.text
            return response

        async def fetch(request_id: str) -> None:
            response = await post("/retrieve_future", request_id=request_id)
            assert response.headers["content-type"] == "application/x-protobuf", response.text
            sizes.append(len(response.content))

        await asyncio.gather(*(post("/asample", seq_id=seq, **fields) for seq in range(NUM)))
        cursor, fetched = 0, list[str]()
        while len(sizes) < NUM:
            target = {"type": "sampling_session", "sampling_session_id": sampler}
            asked = {"target": target, "prev_cursor": cursor, "retrieved_request_ids": fetched}
            answer = (await post("/retrieve_futures", **asked)).json()
            cursor = answer["cursor"]
            fetched = [one["request_id"] for one in answer["completions"]]
            await asyncio.gather(*map(fetch, fetched))
    return sizes


def test_two_thousand_samples(new_gateway: Callable[[], Gateway]):
    gateway = new_gateway()
    wire = Wire(gateway)
    sampler = base_sampler(wire, wire.session())
    before = psutil.Process(gateway.pid).memory_info().rss
    sizes = asyncio.run(sample_all(gateway.url, sampler))
    assert len(sizes) == NUM
    after = psutil.Process(gateway.pid).memory_info().rss
    print(f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")
    assert after - before < MAX_GROWTH_BYTES

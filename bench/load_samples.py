"""Concurrent ``sample()`` calls through the official client: a part of bench/api_load.py.

Runs in an environment with ``baseten-loops``; prints a line of JSON for each line of its input, a number of calls.
"""

import asyncio
import json
import sys
import time

from baseten.loops import ModelInput, SamplingParams, ServiceClient

sampler = ServiceClient().create_sampling_client(base_model=sys.argv[1])
prompt = ModelInput.from_ints(list(range(3, 19)))


async def sample(index: int) -> float:
    started = time.monotonic()
    params = SamplingParams(max_tokens=32, seed=index)
    answer = await sampler.sample_async(prompt, sampling_params=params)
    assert answer.sequences[0].tokens
    return time.monotonic() - started


async def main() -> None:
    await sample(0)
    print("{}", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        took = await asyncio.gather(*(sample(i) for i in range(int(line))), return_exceptions=True)
        errors = [repr(t) for t in took if isinstance(t, BaseException)]
        print(json.dumps({"took": [t for t in took if isinstance(t, float)], "errors": errors}), flush=True)


asyncio.run(main())

"""Queued samples while anything is killed, and the server under many waiting clients."""

import asyncio
import uuid
from collections.abc import Callable

import httpx

from gateway import KEY, MODEL, Gateway, Json, Run, create_run, datum, ok, words

NUM_QUEUED = 16
ASYNC = {"Prefer": "respond-async"}


def queue(http: httpx.Client, path: str, index: int, key: str, **fields: object) -> str:
    # One in eight is too large for its row: its payload and its result are files.
    extra = {"n": 16, "prompt_logprobs": 20} if index % 8 == 0 else {}
    body = {"prompt": words(index, 30), "max_tokens": 24, "logprobs": 0} | extra | fields
    answer = http.post(f"{path}/sample", json=body, headers=ASYNC | {"Idempotency-Key": key})
    return ok(answer, 202)["operation_id"]


def outcome(http: httpx.Client, path: str, id: str) -> Json:
    while True:
        response = http.get(f"{path}/operations/{id}")
        if response.status_code != 408:
            return ok(response)


def sampled(http: httpx.Client, path: str, id: str) -> list[list[int]]:
    ended = outcome(http, path, id)
    assert ended["status"] == "done", ended
    return [choice["token_ids"] for choice in ended["result"]["choices"]]


def test_gateway_killed_between_acceptance_and_result(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    http = own.http()
    run = Run.create(http, seed=2).attached()
    run.train(1)
    run.save("live", "save_weights_for_sampler")
    path = f"/loops/samplers/{run.resource['sampler']['id']}"
    keys = [uuid.uuid4().hex for _ in range(NUM_QUEUED)]
    # Half of them with a seed of the caller's: what they must give is known from a direct request.
    seeds = {i: 100 + i for i in range(0, NUM_QUEUED, 2)}
    ids = [queue(http, path, i, key, **({"seed": seeds[i]} if i in seeds else {})) for i, key in enumerate(keys)]
    assert ids == keys
    seen = {id: sampled(http, path, id) for id in ids[:3]}
    own.kill()
    own.start()
    # The weights and the seed are those of the acceptance, whatever became live meanwhile.
    run.train(2)
    run.save("next", "save_weights_for_sampler")
    first = {id: sampled(http, path, id) for id in ids}
    assert {id: first[id] for id in seen} == seen
    for i in (0, 2):
        body = {"prompt": words(i, 30), "max_tokens": 24, "seed": seeds[i]} | ({"n": 16} if i % 8 == 0 else {})
        pinned = {"X-Checkpoint-Path": f"bt://loops:{run.id}/sampler_weights/live"}
        direct = ok(http.post(f"{path}/sample", json=body, headers=pinned))
        assert [choice["token_ids"] for choice in direct["choices"]] == first[ids[i]]
    own.kill()
    own.start()
    assert {id: sampled(http, path, id) for id in ids} == first
    # A retry after the crash finds what it asked for before.
    assert queue(http, path, 1, keys[1]) == keys[1]


def test_worker_killed_while_it_samples(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    http = own.http()
    path = f"/loops/samplers/{create_run(http)['sampler']['id']}"
    ids = [queue(http, path, i, uuid.uuid4().hex) for i in range(NUM_QUEUED)]
    sampled(http, path, ids[0])
    own.kill_worker()
    assert all(sampled(http, path, id) for id in ids)


def test_a_stopped_gateway_goes_on_with_what_was_queued(new_gateway: Callable[[], Gateway]):
    own = new_gateway()
    http = own.http()
    path = f"/loops/samplers/{create_run(http)['sampler']['id']}"
    ids = [queue(http, path, i, uuid.uuid4().hex) for i in range(NUM_QUEUED)]
    cancelled = [id for id in ids if http.post(f"{path}/operations/{id}/cancel").status_code == 200]
    own.terminate()
    own.start()
    for id in ids:
        ended = outcome(http, path, id)
        assert (ended.get("error_class") == "Cancelled") is (id in cancelled), ended


def test_many_waiting_clients(new_gateway: Callable[[], Gateway]):
    """300 long polls, 60 samples of both modes and management calls at once: all answered, none with an error."""
    own = new_gateway()
    runs = [Run.create(own.http()) for _ in range(6)]
    held = [
        (
            run.path,
            ok(run.post("forward", seq=seq, data=[datum(words(seq))], loss_fn="cross_entropy"), 202)["operation_id"],
        )
        for run in runs
        for seq in range(2, 52)
    ]
    asyncio.run(_crowd(own.url, runs, held))


async def _crowd(url: str, runs: list[Run], held: list[tuple[str, str]]) -> None:
    limits = httpx.Limits(max_connections=500)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits) as http:

        async def poll(path: str, id: str) -> Json:
            while True:
                response = await http.get(f"{path}/operations/{id}")
                if response.status_code != 408:
                    return ok(response)

        async def sample(index: int) -> int:
            path = f"/loops/samplers/{runs[index % len(runs)].resource['sampler']['id']}"
            body = {"prompt": words(index), "max_tokens": 8}
            if index % 2:
                return len(ok(await http.post(f"{path}/sample", json=body))["choices"])
            accepted = ok(await http.post(f"{path}/sample", json=body, headers=ASYNC), 202)
            return len((await poll(path, accepted["operation_id"]))["result"]["choices"])

        polls = [asyncio.create_task(poll(path, id)) for path, id in held]
        samples = [asyncio.create_task(sample(i)) for i in range(60)]
        for run in runs:
            assert ok(await http.get(f"/v1/loops/runs/{run.id}"))["run"]["id"] == run.id
        assert not any(task.done() for task in polls)
        for run in runs:
            first = {"model": MODEL, "run_id": run.id, "seq_id": 1, "lora_rank": 8, "base_model": MODEL}
            ok(await http.post(f"{run.path}/init_trainer_server", json=first), 202)
        assert await asyncio.gather(*samples) == [1] * 60
        assert {ended["status"] for ended in await asyncio.gather(*polls)} == {"done"}

"""Many large bodies at a time: the gateway's memory is bounded, and given back, and nothing is lost."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from gateway import Gateway, Run, datum, ok

MIB = 2**20
NUM_BODIES = 24
BUDGET_MIB = 512


def large_body(run: Run, seq: int) -> bytes:
    """A good operation of about 20 MiB."""
    tokens = [3 + i % 250 for i in range(1000)]
    one = json.dumps(datum(tokens[:250]))
    return (f'{{"seq_id": {seq}, "data": [' + ",".join([one] * (20 * MIB // len(one))) + "]}").encode()


def test_many_large_bodies_ahead_of_their_order(new_gateway: Callable[..., Gateway]) -> None:
    gateway = new_gateway("--body-memory", str(BUDGET_MIB / 1024))
    http = gateway.http()
    run = Run.create(http, max_seq_len=256).attached()
    process = psutil.Process(gateway.pid)
    before = process.memory_info().rss
    peak, done = [before], threading.Event()
    slowest = [0.0]

    def watch() -> None:
        with httpx.Client(base_url=gateway.url, timeout=60) as other:
            while not done.is_set():
                peak[0] = max(peak[0], process.memory_info().rss)
                started = time.monotonic()
                ok(other.get("/healthz"))
                slowest[0] = max(slowest[0], time.monotonic() - started)
                time.sleep(0.02)

    bodies = large_body(run, 1234567)

    def send(number: int) -> int:
        """As the official client sends it: 408 is asked again."""
        body = bodies.replace(b"1234567", b"%d" % (run.seq + 2 + number), 1)
        with httpx.Client(base_url=gateway.url, headers=http.headers, timeout=300) as own:
            while True:
                response = own.post(f"{run.path}/forward", content=body, headers={"Idempotency-Key": f"op{number}"})
                if response.status_code != 408:
                    return response.status_code
                time.sleep(float(response.headers["Retry-After"]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(NUM_BODIES) as pool:
        assert set(pool.map(send, range(NUM_BODIES))) == {202}
    done.set()
    watcher.join()
    print(f"before {before // MIB} MiB, peak {peak[0] // MIB} MiB, slowest /healthz {slowest[0]:.3f} s")
    assert peak[0] - before < (BUDGET_MIB + 256) * MIB
    assert ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    deadline = time.monotonic() + 60
    while process.memory_info().rss - before > 192 * MIB:
        assert time.monotonic() < deadline, f"{(process.memory_info().rss - before) // MIB} MiB are kept"
        time.sleep(0.5)
    print(f"after {process.memory_info().rss // MIB} MiB")

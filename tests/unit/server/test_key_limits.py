"""Limits of a key: who asks too fast waits first, and is refused only when that would take long."""

import asyncio
import time

import pytest

from selfloop.server.app import DIALECTS
from selfloop.server.middleware import key_limits
from selfloop.server.middleware.key_limits import KeyLimiter
from selfloop.server.shared.dialect import Dialect, Dialects
from selfloop.types.errors import RateLimited
from selfloop.types.settings import KeyLimits


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(key_limits.asyncio, "sleep", self._sleep)

    def __call__(self) -> float:
        return self.now

    async def _sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def test_by_default_nothing_is_limited(clock: Clock):
    limits = KeyLimiter(KeyLimits(), clock)
    for _ in range(10_000):
        (await limits.admit("key", is_poll=False)).received(10**9)
    assert clock.now == 0


async def test_requests_are_slowed_down_to_their_rate(clock: Clock):
    limits = KeyLimiter(KeyLimits(requests_per_s=10), clock)
    for _ in range(300):
        (await limits.admit("key", is_poll=False)).end()
    # 50 come at once, as after a pause.
    assert clock.now == pytest.approx(25, abs=1)
    before = clock.now
    (await limits.admit("another", is_poll=False)).end()
    assert clock.now == before


async def test_whoever_would_wait_for_long_is_refused_and_hears_when_to_come_again(clock: Clock):
    limits = KeyLimiter(KeyLimits(body_bytes_per_s=100), clock)
    (await limits.admit("key", is_poll=False)).received(2500)
    with pytest.raises(RateLimited) as refused:
        await limits.admit("key", is_poll=False)
    assert refused.value.retry_s == pytest.approx(20)
    clock.now += refused.value.retry_s
    before = clock.now
    (await limits.admit("key", is_poll=False)).end()
    assert clock.now == before


async def test_polls_carry_no_work_and_are_not_counted_as_requests(clock: Clock):
    limits = KeyLimiter(KeyLimits(requests_per_s=1), clock)
    for _ in range(1000):
        (await limits.admit("key", is_poll=True)).end()
    assert clock.now == 0


async def test_open_requests(clock: Clock):
    limits = KeyLimiter(KeyLimits(open_requests=2), clock)
    first, _second = [await limits.admit("key", is_poll=False) for _ in range(2)]
    for is_poll in (False, True):
        with pytest.raises(RateLimited, match="2 requests open"):
            await limits.admit("key", is_poll=is_poll)
    # A poll is repeated at once by those who poll: so its refusal takes a moment.
    assert clock.now == 2
    (await limits.admit("another", is_poll=False)).end()
    first.end()
    (await limits.admit("key", is_poll=False)).end()


async def test_a_client_that_leaves_while_it_waits_holds_nothing():
    limits = KeyLimiter(KeyLimits(requests_per_s=1, open_requests=1))
    for _ in range(6):
        (await limits.admit("key", is_poll=False)).end()
    waiting = asyncio.create_task(limits.admit("key", is_poll=False))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    (await limits.admit("key", is_poll=True)).end()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/loops/runs", 429),
        # The Loops client repeats 408 with its backoff, and raises a 429.
        ("/loops/runs/x/forward", 408),
        ("/loops/runs/x/operations/y", 408),
        ("/api/v1/asample", 429),
        ("/loops/samplers/x/v1/chat/completions", 429),
        ("/oai/api/v1/completions", 429),
        ("/anthropic/api/v1/messages", 429),
        ("/graphql/", 429),
    ],
)
def test_each_dialect_says_so_in_its_own_way(path: str, status: int):
    dialect = Dialects(DIALECTS, rest=Dialect("server")).of(path)
    answer = dialect.errors.response(RateLimited("too fast", 3.0), path)
    assert (answer.status_code, answer.headers["Retry-After"]) == (status, "3")
    assert "X-Baseten-Error-Source" not in answer.headers
    if path.startswith("/anthropic/"):
        assert b"rate_limit_error" in bytes(answer.body)


async def test_the_wait_is_a_real_one():
    limits = KeyLimiter(KeyLimits(requests_per_s=20))
    started = time.monotonic()
    for _ in range(104):
        (await limits.admit("key", is_poll=False)).end()
    assert time.monotonic() - started >= 0.1

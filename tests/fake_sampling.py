"""The queue of samples on a temporary folder, with a sampling that only counts; can be torn down and set up again."""

import asyncio
import time
from pathlib import Path
from typing import cast

from fake_house import RUN_ID, FakeHouse
from selfloop.control.sampling.queued_samples import QueuedSamples
from selfloop.control.sampling.service import SampleSpec, Sampling, Weights
from selfloop.storage.db import queries_resources
from selfloop.storage.db.tables import SamplerRow
from selfloop.types.errors import OperationFailed
from selfloop.types.resources import Sampler
from selfloop.types.sampling import SampledSequence, SampleResult, SamplingParams

SAMPLER_ID = "sampler"
BASE = Weights(None, 0)


def spec_of(value: int, seed: int | None = None, length: int = 1) -> SampleSpec:
    return SampleSpec([value] * length, 1, SamplingParams(max_tokens=4, seed=seed))


class FakeSampling:
    """Tokens that show what they were sampled from; held back while ``gate`` is closed."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_sampled = 0

    async def check(self, _sampler: Sampler, _spec: SampleSpec) -> None: ...

    async def sample(self, _sampler: Sampler, weights: Weights, spec: SampleSpec) -> SampleResult:
        await self.gate.wait()
        await asyncio.sleep(0)
        self.num_sampled += 1
        assert spec.params.seed is not None
        if spec.prompt[0] < 0:
            raise OperationFailed("asked to fail", "Asked")
        tokens = [*spec.prompt, spec.params.seed % 2**31, weights.policy_version]
        return SampleResult("request", [SampledSequence(tokens, [0.0] * len(tokens), "length", "")])


class FakeSamplingHouse:
    """``await FakeSamplingHouse.open(folder)`` is a gateway's start; ``crash()`` its death at any instant."""

    def __init__(self, house: FakeHouse, sampler: Sampler) -> None:
        self.house = house
        self.sampler = sampler
        self.sampling = FakeSampling()
        self.queue = QueuedSamples(house.context, cast(Sampling, self.sampling))

    @classmethod
    async def open(cls, folder: Path) -> "FakeSamplingHouse":
        house = await FakeHouse.open(folder)
        async with house.db.write() as session:
            sampler = await queries_resources.sampler(session, SAMPLER_ID)
            if sampler is None:
                row = _sampler()
                session.add(row)
                sampler = row.view()
        own = cls(house, sampler)
        await own.queue.start()
        return own

    async def accept(self, spec: SampleSpec, id: str, fingerprint: str = "", weights: Weights = BASE) -> str:
        return await self.queue.accept(self.sampler, id, fingerprint or id, weights, spec, with_logprobs=True)

    async def crash(self) -> None:
        """Everything in memory is gone; what was durable stays."""
        await self.queue.stop()
        await self.house.crash()


def _sampler() -> SamplerRow:
    return SamplerRow(
        id=SAMPLER_ID,
        session_id="session",
        team_id="team",
        key_id="key",
        base_model="tiny",
        model_name="tiny",
        model_id="model",
        deployment_id="deploy",
        max_seq_len=64,
        scale_down_delay_s=3600,
        status="ACTIVE",
        created_at=time.time(),
        run_id=RUN_ID,
    )

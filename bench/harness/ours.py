"""Our side: the engine through its front door."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.harness.measure import now
from selfloop.engine.engine import Engine
from selfloop.types.datum import Datum
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampledSequence, SampleRequest, SamplingParams

ADAM = AdamParams()


class Drawn(NamedTuple):
    """Samples of some requests, in their order, and how long they took.

    Args:
        first_s: until the end of the step in which the last request could begin, counted from submission: for
            requests that fit one step's prefill, the time to the first token of all.
        rest_s: from then to the end.
    """

    sequences: list[list[SampledSequence]]
    first_s: float
    rest_s: float

    @property
    def total_s(self) -> float:
        return self.first_s + self.rest_s


def load(model_dir: Path, dtype: str, device: str = "auto") -> Engine:
    return Engine.load(model_dir, dtype=dtype, device=device)


def train_step(engine: Engine, run_id: str, data: list[Datum]) -> None:
    engine.forward_backward(run_id, data, "cross_entropy", {})
    engine.optim_step(run_id, ADAM)


def custom_loss(engine: Engine, data: list[Datum], *, forward_run: str, backward_run: str) -> None:
    """The two calls of a loss that the client computes, and a step. Another run's forward is useless to the second."""
    engine.forward(forward_run, data, "cross_entropy", {}, summed=True)
    engine.forward_backward(backward_run, data, "cross_entropy", {}, summed=True)
    engine.optim_step(backward_run, ADAM)


def requests(
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    adapters: Sequence[str | None] = (None,),
    num_samples: int = 1,
    use_end_tokens: bool = False,
) -> list[SampleRequest]:
    """A request a prompt, which runs to its full length unless ``use_end_tokens``; ``adapters`` go round."""
    made: list[SampleRequest] = []
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, seed=i, use_end_tokens=use_end_tokens)
        adapter = adapters[i % len(adapters)]
        ref = None if adapter is None else AdapterRef(adapter)
        made.append(SampleRequest(str(i), list(prompt), num_samples, params, ref))
    return made


def sample(engine: Engine, asked: Sequence[SampleRequest]) -> Drawn:
    """Submit all at once and step until all are done."""
    started = now()
    for request in asked:
        engine.submit_sample(request)
    results: dict[str, list[SampledSequence]] = {}
    first_s = 0.0
    while engine.num_sampling:
        finished = engine.sample_step()
        assert not (failed := engine.take_failed_samples()), failed
        first_s = first_s or now() - started
        results |= {result.request_id: result.sequences for result in finished}
    total_s = now() - started
    return Drawn([results[request.request_id] for request in asked], first_s, total_s - first_s)

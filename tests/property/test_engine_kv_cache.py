"""The page pool under any order of allocation, sharing and release; the scheduler under any requests."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfloop.engine.backends.base import Model
from selfloop.engine.backends.select import load_model
from selfloop.engine.models.registry import parse_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.sample.model_runner import ModelRunner
from selfloop.engine.sample.scheduler import SamplingScheduler
from selfloop.types.sampling import SampleRequest, SamplingParams

RAW = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


class RandomSource:
    """Weights of a model that is nowhere else."""

    def __init__(self, spec: ModelSpec) -> None:
        torch.manual_seed(0)
        self._tensors = {name: torch.randn(shape) for name, shape in spec.tensors().items()}

    def names(self):
        return self._tensors.keys()

    def read(self, names):
        return [(name, self._tensors[name]) for name in names]


def tiny_model() -> Model:
    spec = parse_spec(RAW, {})
    return load_model(spec, RandomSource(spec), torch.device("cpu"), torch.float32)


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 5)), max_size=40))
def test_pool_keeps_its_books(actions):
    pool = tiny_model().make_cache(16 * 8).pool
    held: list[list[int]] = []
    for action, number in actions:
        if action == "take" and number <= pool.num_free:
            held.append(pool.allocate(number))
        elif action == "share" and held:
            pool.share(held[number % len(held)])
            held.append(list(held[number % len(held)]))
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        pool.check_integrity()
    for pages in held:
        pool.release(pages)
    pool.check_integrity()
    assert pool.num_free == pool.num_pages


REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 30)), min_size=1, max_size=6)


@settings(max_examples=25)
@given(REQUESTS, st.integers(6, 12), st.integers(1, 50), st.integers(1, 5))
def test_scheduler_finishes_every_request_and_returns_every_page(requests, num_pages, budget, max_batch):
    runner = ModelRunner(tiny_model(), num_pages * 16)
    pool = runner.cache.pool
    scheduler = SamplingScheduler(
        runner,
        prefill_budget=budget,
        max_batch=max_batch,
        vocabulary=None,
        compile_grammar=None,
    )
    for index, (length, num_samples, max_tokens) in enumerate(requests):
        params = SamplingParams(max_tokens=max_tokens, seed=index)
        scheduler.submit(SampleRequest(str(index), [1] * length, num_samples, params), None, stream=False)
    finished = {}
    for _ in range(2000):
        if not scheduler.num_requests:
            break
        with torch.inference_mode():
            finished.update({r.request_id: r for r in scheduler.step()})
        pool.check_integrity()
    assert len(finished) == len(requests)
    for index, (_, num_samples, max_tokens) in enumerate(requests):
        assert [len(s.tokens) for s in finished[str(index)].sequences] == [max_tokens] * num_samples
    assert pool.num_available == pool.num_pages

"""The page pool under any order of allocation, sharing and release; the scheduler under any requests."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfloop.engine.backends.torch.decoder import BaseWeights, Decoder, LayerWeights
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.kv.pages import KvRows, PagePool
from selfloop.engine.lora.targets import linear_groups
from selfloop.engine.models.config import ModelConfig, parse_config
from selfloop.engine.sample.model_runner import cache_passes
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


def tiny_config() -> ModelConfig:
    return parse_config(RAW, {})


def tiny_decoder() -> Decoder:
    config = tiny_config()
    torch.manual_seed(0)
    linears = [
        FrozenLinear(torch.randn(sum(t.out_features for t in group.targets), group.in_features), None)
        for group in linear_groups(config)
    ]
    layer = LayerWeights(torch.ones(8), torch.ones(8), tuple(linears), None)
    return Decoder(
        config, BaseWeights(torch.randn(11, 8), [layer], torch.ones(8), FrozenLinear(torch.randn(11, 8)), False)
    )


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 5)), max_size=40))
def test_pool_keeps_its_books(actions):
    pool = PagePool(KvRows(tiny_config(), 16 * 8, torch.device("cpu"), torch.float32))
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
    decoder = tiny_decoder()
    passes = cache_passes(decoder, num_pages * 16, 256)
    pool = passes.pool
    scheduler = SamplingScheduler(
        decoder,
        passes,
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

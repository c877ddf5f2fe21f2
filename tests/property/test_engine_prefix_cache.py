"""The prefix cache: no page is lost, none is written while others read it, and nothing changes but the work."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_kv_cache import tiny_model

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.kv.pages import PAGE_TOKENS
from selfloop.engine.kv.prefix_cache import PrefixCache
from selfloop.engine.lora.adapter import Adapter
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits

NUM_PAGES = 12
# Few tokens, so that texts begin alike.
TEXTS = st.lists(st.sampled_from([(0,), (1,)]), max_size=6).map(lambda pages: [t for (t,) in pages for _ in range(16)])


@given(st.lists(st.tuples(st.sampled_from(["begin", "end", "abandon"]), TEXTS, st.integers(0, 2)), max_size=40))
def test_cache_keeps_its_books(actions):
    pool = tiny_model().make_cache(PAGE_TOKENS * NUM_PAGES).pool
    cache = PrefixCache(pool)
    versions = [None, *(Adapter(1.0, [], torch.empty(0)) for _ in range(2))]
    running, content = [], {}
    for action, text, number in actions:
        if action == "begin":
            tokens = [*text, 7]
            found = cache.match(versions[number], tokens).pages
            for index, page in enumerate(found):
                # A page that is found holds these weights' values of these very tokens.
                assert content[page] == (number, tuple(tokens[: (index + 1) * PAGE_TOKENS]))
            more = len(text) // PAGE_TOKENS + 1 - len(found)
            if more > pool.num_available:
                pool.release(found)
            else:
                own = pool.allocate(more)
                busy = {page for _, _, pages in running for page in pages} | set(found)
                assert busy.isdisjoint(own)
                for index, page in enumerate(own, start=len(found)):
                    content[page] = (number, tuple(tokens[: (index + 1) * PAGE_TOKENS]))
                running.append((number, tokens, found + own))
        elif running:
            which, tokens, pages = running.pop(number % len(running))
            if action == "end":
                cache.insert(versions[which], tokens, pages)
            pool.release(pages)
        pool.check_integrity()
    for _, _, pages in running:
        pool.release(pages)
    assert pool.num_available == NUM_PAGES
    cache.clear()
    assert pool.num_free == NUM_PAGES
    pool.check_integrity()


REQUESTS = st.lists(
    st.tuples(st.sampled_from([1, 15, 16, 17, 33, 50]), st.integers(0, 1), st.integers(1, 3), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)
_ENGINES: list[Engine] = []


def engines(folder) -> list[Engine]:
    """One with a cache of pages too small to keep everything and a window for one sample, one with room."""
    if not _ENGINES:
        model = tiny_models.save("llama-tied", folder)
        for num_tokens, budget in ((16 * 14, 12), (4096, 512)):
            engine = Engine.load(
                model,
                device="cpu",
                dtype="float32",
                limits=EngineLimits(max_kv_tokens=num_tokens, train_token_budget=budget),
            )
            engine.init_run("run", rank=4, seed=1)
            engine._runs["run"].theta_P.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
            engine.publish("run", "first")
            engine._runs["run"].theta_P.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
            engine.publish("run", "second")
            _ENGINES.append(engine)
        _ENGINES[0]._scheduler._cache.buckets._max_tokens = 128
    return _ENGINES


def sampled(engine, requests, *, together):
    results = {}
    for index, (length, text, num_samples, version) in enumerate(requests):
        prompt = tiny_models.random_ids(50, seed=text)[:length]
        adapter = (None, AdapterRef("first"), AdapterRef("second"))[version]
        params = SamplingParams(max_tokens=20, seed=index, use_end_tokens=False)
        if not together:
            engine._scheduler._prefixes.clear()
        engine.submit_sample(SampleRequest(str(index), prompt, num_samples, params, adapter))
        while not together and engine.num_sampling:
            results.update({r.request_id: r.sequences for r in engine.sample_step()})
    while engine.num_sampling:
        results.update({r.request_id: r.sequences for r in engine.sample_step()})
        engine._scheduler._pool.check_integrity()
    return results


@settings(max_examples=12)
@given(requests=REQUESTS)
def test_shared_prefixes_chunks_and_eviction_change_no_sample(tmp_path_factory, requests):
    small, large = engines(tmp_path_factory.mktemp("model") / "m")
    expected = sampled(large, requests, together=False)
    for engine in (small, large):
        for name, sequences in sampled(engine, requests, together=True).items():
            for ours, theirs in zip(sequences, expected[name], strict=True):
                assert ours.tokens == theirs.tokens
                assert max(abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)) < 1e-4

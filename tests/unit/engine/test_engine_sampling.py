"""Continuous batching: stops, seeds, queueing, the adapter bank."""

import pytest

import tiny_models
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits

PROMPT = tiny_models.random_ids(10, seed=1)


def request(request_id="q", *, prompt=PROMPT, num_samples=1, adapter=None, **params):
    settings = {"max_tokens": 12, "seed": 7, **params}
    return SampleRequest(request_id, prompt, num_samples, SamplingParams(**settings), adapter)


def run_all(engine, *requests):
    for item in requests:
        engine.submit_sample(item)
    results = {}
    while engine.num_sampling:
        engine._scheduler._pool.check_integrity()
        results.update({r.request_id: r for r in engine.sample_step()})
    assert engine._scheduler._pool.num_available == engine._scheduler._pool.num_pages
    assert engine.take_failed_samples() == []
    return results


def one(engine, **settings):
    return run_all(engine, request(**settings))["q"].sequences


def text_of(tokens):
    return "".join(chr(0x4E00 + token) for token in tokens)


def test_length_ends_a_sample(engine):
    (sequence,) = one(engine, seed=1)
    assert sequence.stop_reason == "length"
    assert len(sequence.tokens) == len(sequence.logprobs) == 12
    assert sequence.text == text_of(sequence.tokens)


def test_a_seed_reproduces_and_samples_differ(engine):
    first, again = one(engine, num_samples=3), one(engine, num_samples=3)
    assert first == again
    assert len({tuple(s.tokens) for s in first}) == 3
    assert one(engine, seed=8) != first[:1]
    assert one(engine)[0].tokens == first[0].tokens


def test_without_a_seed_draws_are_fresh(engine):
    assert one(engine, seed=None, max_tokens=20) != one(engine, seed=None, max_tokens=20)


def test_result_does_not_depend_on_batch_mates(engine):
    alone = one(engine, num_samples=2)
    others = [request(f"o{i}", prompt=tiny_models.random_ids(3 + 9 * i, seed=i), seed=i) for i in range(4)]
    together = run_all(engine, *others[:2], request(num_samples=2), *others[2:])["q"].sequences
    assert [s.tokens for s in together] == [s.tokens for s in alone]


def test_requests_join_while_others_run(engine):
    engine._scheduler._end_tokens = frozenset()
    expected = one(engine, num_samples=2)
    engine.submit_sample(request("long", max_tokens=40))
    for _ in range(5):
        assert engine.sample_step() == []
    late = run_all(engine, request(num_samples=2))
    assert [s.tokens for s in late["q"].sequences] == [s.tokens for s in expected]
    assert len(late["long"].sequences[0].tokens) == 40


@pytest.mark.parametrize(
    ("lengths", "num_steps"),
    [
        pytest.param([8, 8], 1, id="a burst that fits one pass"),
        pytest.param([16], 4, id="one prompt, in quarters"),
        pytest.param([16, 16], 8, id="more than one pass holds"),
    ],
)
def test_how_long_prompts_take_beside_a_running_sample(load, lengths, num_steps):
    """Every step grows the running sample; prompts get a quarter of the budget, or all of it for a burst."""
    engine = load(limits=EngineLimits(train_token_budget=16))
    engine.submit_sample(request("runs", max_tokens=40))
    engine.sample_step()
    for number, length in enumerate(lengths):
        prompt = tiny_models.random_ids(length, seed=10 + number)
        engine.submit_sample(request(f"q{number}", prompt=prompt, max_tokens=1))
    met: list[str] = []
    while len(met) < len(lengths):
        met += [result.request_id for result in engine.sample_step()]
        num_steps -= 1
    assert num_steps == 0
    assert set(met) == {f"q{number}" for number in range(len(lengths))}


def test_a_stop_token_is_returned_and_not_in_the_text(engine):
    (free,) = one(engine)
    stop = free.tokens[4]
    (stopped,) = one(engine, stop_token_ids=[stop])
    end = free.tokens.index(stop) + 1
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free.tokens[:end]
    assert stopped.logprobs == pytest.approx(free.logprobs[:end], abs=1e-5)
    assert stopped.text == text_of(free.tokens[: end - 1])


def test_the_models_end_token_stops(load, engine):
    (free,) = one(engine)
    other = load()
    other._scheduler._end_tokens = frozenset({free.tokens[2]})
    (stopped,) = one(other)
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]


def test_a_stop_string_over_two_tokens_cuts_the_text_before_it(engine):
    (free,) = one(engine)
    (stopped,) = one(engine, stop=["never", text_of(free.tokens[3:5])])
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free.tokens[:5]
    assert stopped.text == text_of(free.tokens[:3])


def test_stop_strings_need_a_vocabulary(load):
    with pytest.raises(BadRequest, match="stop"):
        load(vocabulary=None).submit_sample(request(stop=["x"]))


def test_more_tokens_than_the_cache_holds_are_refused(load):
    engine = load(limits=EngineLimits(max_kv_tokens=32))
    with pytest.raises(BadRequest, match="KV cache"):
        engine.submit_sample(request(max_tokens=40))
    with pytest.raises(BadRequest, match="positions"):
        engine.submit_sample(request(max_tokens=1000))
    assert engine.num_sampling == 0


def test_tokens_outside_the_vocabulary_are_refused(engine):
    with pytest.raises(BadRequest, match="prompt"):
        engine.submit_sample(request(prompt=[tiny_models.VOCAB_SIZE]))


def test_requests_queue_for_cache_and_come_out_the_same(load, engine):
    requests = [request(f"q{i}", prompt=tiny_models.random_ids(5 + 7 * i, seed=i), num_samples=3) for i in range(5)]
    expected = run_all(engine, *requests)
    tight = load(limits=EngineLimits(max_kv_tokens=96))
    results = run_all(tight, *requests)
    for request_id, result in expected.items():
        assert [s.tokens for s in results[request_id].sequences] == [s.tokens for s in result.sequences]


@pytest.mark.parametrize("max_tokens", [1, 2, 6, 7])
@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_page_borders(load, length, max_tokens):
    prompt = tiny_models.random_ids(length, seed=2)
    sequences = one(
        load(limits=EngineLimits(max_kv_tokens=64)), prompt=prompt, max_tokens=max_tokens, num_samples=4, temperature=0
    )
    assert len({tuple(s.tokens) for s in sequences}) == 1


def test_cancel_frees_the_cache(engine):
    for i in range(3):
        engine.submit_sample(request(f"q{i}", num_samples=2))
    engine.sample_step()
    engine.cancel_sample("q1")
    engine.submit_sample(request("waiting"))
    engine.cancel_sample("waiting")
    engine.cancel_sample("unknown")
    assert engine.num_sampling == 2
    assert run_all(engine).keys() == {"q0", "q2"}


def test_unknown_adapter_is_not_found(engine):
    with pytest.raises(NotFound):
        engine.submit_sample(request(adapter=AdapterRef("nowhere")))


def test_published_adapter_is_a_frozen_copy(engine):
    engine.init_run("run", rank=4, seed=1)
    run = engine._runs["run"]
    run.theta_P.normal_(0, 0.1)
    engine.publish("run", "c1")
    ref = AdapterRef("c1")
    before = one(engine, adapter=ref)
    assert before != one(engine)
    run.theta_P.zero_()
    assert one(engine, adapter=ref) == before


def test_adapter_from_files_samples_like_the_published_one(engine, tmp_path):
    engine.init_run("run", rank=4, seed=1)
    engine._runs["run"].theta_P.normal_(0, 0.1)
    engine.publish("run", "memory")
    engine.save_sampler_checkpoint("run", tmp_path / "files")
    engine.load_adapter("files", tmp_path / "files")
    assert one(engine, adapter=AdapterRef("files")) == one(engine, adapter=AdapterRef("memory"))


def test_the_bank_evicts_the_longest_unused_but_none_in_use(load):
    engine = load(limits=EngineLimits(max_adapters=2))
    engine.init_run("run", rank=2, seed=1)
    engine.publish("run", "a")
    engine.publish("run", "b")
    engine.submit_sample(request(adapter=AdapterRef("a")))
    engine.publish("run", "c")
    assert [engine.has_adapter(name) for name in "abc"] == [True, False, True]
    engine.submit_sample(request("r", adapter=AdapterRef("c")))
    engine.publish("run", "d")
    assert [engine.has_adapter(name) for name in "acd"] == [True, True, True]
    run_all(engine)
    engine.publish("run", "e")
    assert [engine.has_adapter(name) for name in "acde"] == [False, False, True, True]


def test_dropped_adapter_serves_requests_under_way(engine):
    engine.init_run("run", rank=4, seed=1)
    engine._runs["run"].theta_P.normal_(0, 0.1)
    engine.publish("run", "c")
    expected = one(engine, adapter=AdapterRef("c"))
    engine.submit_sample(request("r", adapter=AdapterRef("c")))
    engine.drop_adapter("c")
    assert not engine.has_adapter("c")
    assert run_all(engine)["r"].sequences == expected


def test_logits_that_are_not_finite_fail_their_request_only(engine):
    engine.init_run("run", rank=4, seed=1)
    engine._runs["run"].theta_P.fill_(1e30)
    engine.publish("run", "broken")
    engine.submit_sample(request("bad", num_samples=2, adapter=AdapterRef("broken")))
    engine.submit_sample(request("good"))
    results = []
    while engine.num_sampling:
        results += engine.sample_step()
    assert [r.request_id for r in results] == ["good"]
    ((failed_id, error),) = engine.take_failed_samples()
    assert failed_id == "bad"
    assert error.error_class == "NonFiniteLogits"
    engine._scheduler._pool.check_integrity()
    assert engine._scheduler._pool.num_available == engine._scheduler._pool.num_pages

"""Prompts of a model with recurrent states begin with what others left: states at the ends of chunks, beside pages."""

import pytest
import torch

import tiny_models
from selfloop.engine.backends.torch.delta_rule import CHUNK
from selfloop.engine.engine import Engine
from selfloop.engine.sample import scheduler
from selfloop.engine.sample.model_runner import ModelRunner
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits

(FAMILY,) = tiny_models.RECURRENT_FAMILIES
LONG = 2 * CHUNK + 22


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save(FAMILY, tmp_path_factory.mktemp("recurrent") / "model")


@pytest.fixture
def load(folder, monkeypatch):
    """Engines, and how many tokens each has read of prompts."""
    read: dict[int, int] = {}
    prefill = ModelRunner.prefill

    def counting(self, tokens, chunks, lora):
        read[id(self)] = read.get(id(self), 0) + len(tokens)
        return prefill(self, tokens, chunks, lora)

    monkeypatch.setattr(ModelRunner, "prefill", counting)

    def loaded(*, num_tokens=4096, budget=512):
        limits = EngineLimits(max_kv_tokens=num_tokens, train_token_budget=budget)
        engine = Engine.load(folder, device="cpu", dtype="float32", limits=limits)
        engine.init_run("run", rank=4, seed=1)
        for number, name in enumerate(("first", "second"), start=1):
            engine._runs["run"].theta_P.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
            engine.publish("run", name)
        return engine, lambda: read.get(id(engine._scheduler._runner), 0)

    return loaded


def ids(num, seed=0):
    return tiny_models.random_ids(num, seed)


def request(name, prompt, adapter=None, *, num=1, max_tokens=6, **more):
    params = SamplingParams(max_tokens=max_tokens, seed=3, use_end_tokens=False)
    return SampleRequest(name, prompt, num, params, None if adapter is None else AdapterRef(adapter), **more)


def sampled(engine, *requests):
    for each in requests:
        engine.submit_sample(each)
    found = {}
    while engine.num_sampling:
        found |= {result.request_id: result for result in engine.sample_step()}
        engine._scheduler._pool.check_integrity()
    assert not engine.take_failed_samples()
    return [found[each.request_id] for each in requests]


def test_the_same_prompt_is_read_once_with_the_same_bits(load):
    engine, num_read = load()
    assert engine._model.contracts.state_tokens == CHUNK
    first, again = (sampled(engine, request(name, ids(LONG), num=2))[0] for name in "ab")
    assert (first.num_cached, again.num_cached) == (0, 2 * CHUNK)
    assert first.sequences == again.sequences
    assert num_read() == LONG + 22


def test_requests_that_come_together_wait_for_the_one_that_reads(load):
    engine, num_read = load()
    results = sampled(engine, *(request(str(number), ids(LONG)) for number in range(5)))
    assert [result.num_cached for result in results] == [0] + 4 * [2 * CHUNK]
    assert all(result.sequences == results[0].sequences for result in results)
    assert num_read() == LONG + 4 * 22


def test_a_conversation_goes_on_from_its_last_turn(load):
    engine, _ = load()
    prompt, turns = ids(CHUNK + 6), []
    for turn in range(3):
        (result,) = sampled(engine, request(f"turn{turn}", prompt, "first"))
        turns.append(result)
        fresh, _ = load()
        (alone,) = sampled(fresh, request("alone", prompt, "first"))
        (ours,), (theirs,) = result.sequences, alone.sequences
        assert ours.tokens == theirs.tokens
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), rtol=0, atol=2e-5)
        prompt = [*prompt, *ours.tokens, *ids(CHUNK + 5, turn)]
    assert [turn.num_cached for turn in turns] == [0, CHUNK, 2 * CHUNK]


def test_other_weights_another_beginning_and_short_prompts_share_nothing(load):
    engine, num_read = load()
    prompts = [ids(LONG), [7, *ids(LONG)[1:]]]
    asked = [("a", prompts[0], "first"), ("b", prompts[0], "second"), ("c", prompts[0], None), ("d", prompts[1], None)]
    results = [sampled(engine, request(*each))[0] for each in asked]
    results += [sampled(engine, request(name, ids(CHUNK)))[0] for name in "ef"]
    assert [result.num_cached for result in results] == 6 * [0]
    assert num_read() == 4 * LONG + 2 * CHUNK
    # What is asked about a prompt is read off all of it.
    (scored,) = sampled(engine, request("g", prompts[0], None, prompt_logprobs=1))
    assert scored.num_cached == 0


def test_so_many_states_are_kept_and_all_are_let_go(load, monkeypatch):
    monkeypatch.setattr(scheduler, "NUM_KEPT_STATES", 2)
    engine, _ = load()
    prefixes, states = engine._scheduler._prefixes, engine._scheduler._cache._states
    for seed in (0, 1, 0, 2):
        sampled(engine, request("a", ids(LONG, seed)))
    assert prefixes.num_states == 2 == len(states._row)
    cached = [sampled(engine, request("a", ids(LONG, seed)))[0].num_cached for seed in (1, 2, 1)]
    assert cached == [0, 2 * CHUNK, 2 * CHUNK], "the longest unused goes"
    prefixes.clear()
    assert prefixes.num_states == 0 == len(states._row)
    assert engine._scheduler._pool.num_free == engine._scheduler._pool.num_pages


def test_pages_that_are_needed_take_their_states_along(load):
    """A cache for one prompt at a time, read a few tokens at a time, gives the numbers of one with room."""
    small, _ = load(num_tokens=LONG + 48, budget=40)
    large, _ = load()
    for seed, length in ((0, LONG), (1, LONG), (1, CHUNK + 9), (0, LONG), (1, LONG), (1, LONG)):
        asked = request("a", ids(length, seed), "second", num=2)
        (ours,), (theirs,) = sampled(small, asked), sampled(large, asked)
        for one, other in zip(ours.sequences, theirs.sequences, strict=True):
            assert one.tokens == other.tokens
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=2e-5)
        assert small._scheduler._prefixes.num_states <= 2
    states = small._scheduler._cache._states
    assert len(states._row) == small._scheduler._prefixes.num_states


def test_what_is_cancelled_leaves_no_state_behind(load):
    engine, _ = load(budget=32)
    for name in "ab":
        engine.submit_sample(request(name, ids(LONG)))
    for _ in range(3):
        engine.sample_step()
    engine.cancel_sample("a")
    (result,) = sampled(engine, request("c", ids(LONG)))
    assert result.num_cached == 2 * CHUNK, "b has read it"
    assert len(engine._scheduler._cache._states._row) == engine._scheduler._prefixes.num_states == 1

"""Samples as they grow, the likeliest tokens, and constraints: with a grammar made by hand."""

import pytest
import torch

import tiny_models
from selfloop.engine.sample.grammar import Constraint, unpack_bits
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.sampling import SampleDelta, SampledSequence, SampleRequest, SamplingParams, StructuredOutput

PROMPT = tiny_models.random_ids(10, seed=1)
SOMETHING = StructuredOutput("regex", "the grammars of these tests do not read it")


def request(request_id="q", *, num_samples=1, top_logprobs=0, token_bytes=False, prompt_logprobs=None, **params):
    settings = SamplingParams(**{"max_tokens": 12, "seed": 7, **params})
    return SampleRequest(request_id, PROMPT, num_samples, settings, None, prompt_logprobs, top_logprobs, token_bytes)


def stream_all(engine, *requests):
    """Results and, of each request, the deltas of every step."""
    for item in requests:
        engine.submit_sample(item, stream=True)
    results, steps = {}, {item.request_id: [] for item in requests}
    while engine.num_sampling:
        finished = {r.request_id: r for r in engine.sample_step()}
        for request_id, deltas in engine.take_sample_deltas().items():
            steps[request_id].append(deltas)
        results |= finished
    assert engine._scheduler._pool.num_available == engine._scheduler._pool.num_pages
    return results, steps


def added_up(deltas: list[SampleDelta]) -> SampledSequence:
    def joined(parts):
        parts = list(parts)
        return None if parts[0] is None else [item for part in parts for item in part]

    assert [d.stop_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].stop_reason is not None
    return SampledSequence(
        joined(d.tokens for d in deltas),
        joined(d.logprobs for d in deltas),
        deltas[-1].stop_reason,
        "".join(d.text for d in deltas),
        joined(d.top_logprobs for d in deltas),
        joined(d.token_bytes for d in deltas),
        deltas[-1].stop_string,
    )


@pytest.mark.parametrize("asked", [{}, {"top_logprobs": 3, "token_bytes": True}])
def test_deltas_add_up_to_the_sequences(engine, asked):
    (free,) = stream_all(engine, request())[0]["q"].sequences
    requests = [
        request("plain", num_samples=3, **asked),
        request("stop-string", num_samples=2, stop=[free.text[3:5], "never"], **asked),
        request("stop-token", stop_token_ids=[free.tokens[4]], **asked),
        request("one", max_tokens=1, **asked),
    ]
    results, steps = stream_all(engine, *requests)
    for item in requests:
        deltas = [d for step in steps[item.request_id] for d in step]
        for index, sequence in enumerate(results[item.request_id].sequences):
            assert added_up([d for d in deltas if d.index == index]) == sequence
        # One token a step: it is reported at once.
        assert all(len(d.tokens) == 1 for d in deltas)
    assert results["stop-string"].sequences[0].text == free.text[:3]


def test_a_beginning_of_a_stop_string_is_held_back_until_it_is_none(engine):
    (free,) = stream_all(engine, request())[0]["q"].sequences
    results, steps = stream_all(engine, request(stop=[free.text[2:4] + "x"]))
    texts = [delta.text for (delta,) in steps["q"]]
    assert texts[2:5] == ["", "", free.text[2:5]]
    assert results["q"].sequences[0] == free


def test_nothing_is_reported_of_requests_that_do_not_stream(engine):
    engine.submit_sample(request())
    while engine.num_sampling:
        engine.sample_step()
        assert engine.take_sample_deltas() == {}


def test_a_cancelled_stream_is_silent(engine):
    engine.submit_sample(request(), stream=True)
    engine.sample_step()
    engine.cancel_sample("q")
    assert engine.take_sample_deltas() == {}
    assert engine.num_sampling == 0


def test_top_logprobs_are_those_of_the_model(engine):
    results, _ = stream_all(
        engine, request("cold", temperature=0, top_logprobs=4), request("hot", temperature=5.0, top_logprobs=4)
    )
    for result in results.values():
        (sequence,) = result.sequences
        for token, logprob, top in zip(sequence.tokens, sequence.logprobs, sequence.top_logprobs, strict=True):
            assert [t.rank for t in top] == [1, 2, 3, 4]
            assert [t.logprob for t in top] == sorted((t.logprob for t in top), reverse=True)
            assert all(t.logprob == logprob for t in top if t.token == token)
            assert all(t.raw is None for t in top)
    (cold,) = results["cold"].sequences
    assert [top[0].token for top in cold.top_logprobs] == cold.tokens


def test_bytes_of_all_tokens_where_asked_for(engine):
    results, _ = stream_all(engine, request(token_bytes=True, top_logprobs=2, prompt_logprobs=1))
    (sequence,) = results["q"].sequences
    assert b"".join(sequence.token_bytes).decode() == sequence.text
    shown = [*(t for top in sequence.top_logprobs for t in top)]
    shown += [t for position in results["q"].prompt_logprobs[1:] for t in position]
    assert all(t.raw == chr(0x4E00 + t.token).encode() for t in shown)


def test_bytes_need_a_vocabulary(load):
    with pytest.raises(BadRequest, match="token_bytes"):
        load(vocabulary=None).submit_sample(request(token_bytes=True))


class Steps:
    """Allows a set of tokens at each place; the text is whole after the last one."""

    def __init__(self, *steps: set[int], fails_after: int = 1000):
        self.steps, self.fails_after = steps, fails_after

    def start(self):
        return Place(self)


class Place:
    def __init__(self, grammar):
        self.grammar, self.at = grammar, 0

    def allowed(self):
        if self.at >= self.grammar.fails_after:
            raise OperationFailed("structured_outputs: too complex", "BadRequest")
        allowed = self.grammar.steps[self.at] if self.at < len(self.grammar.steps) else set()
        return sum(1 << token for token in allowed).to_bytes(tiny_models.VOCAB_SIZE // 8, "little")

    def is_accepting(self):
        return self.at >= len(self.grammar.steps)

    def accept(self, token):
        assert token in self.grammar.steps[self.at]
        self.at += 1


def constrained(load, grammar):
    return load(compile_grammar=lambda structured: grammar)


def test_a_constrained_sample_takes_allowed_tokens_and_ends_with_the_grammar(load):
    steps = [{10, 11, 12}, {20, 21}, {30, tiny_models.EOS}]
    engine = constrained(load, Steps(*steps))
    results, _ = stream_all(engine, request(num_samples=20, structured=SOMETHING))
    sequences = results["q"].sequences
    assert all(s.stop_reason == "stop" for s in sequences)
    assert all(t in allowed for s in sequences for t, allowed in zip(s.tokens, steps, strict=True))
    # The end token was not whole text's to take, although the grammar's mask had it.
    assert {s.tokens[2] for s in sequences} == {30}
    assert len({s.tokens[0] for s in sequences}) > 1


def test_constrained_draws_reproduce_and_leave_their_mates_alone(load):
    steps = [set(range(50, 90))] * 40
    engine = constrained(load, Steps(*steps))
    mates = [request(f"m{i}", seed=i, top_logprobs=1) for i in range(3)]
    alone, _ = stream_all(engine, *mates)
    bound = request("bound", num_samples=2, structured=SOMETHING)
    together, _ = stream_all(engine, mates[0], bound, *mates[1:])
    for mate in mates:
        expected, (got,) = alone[mate.request_id].sequences[0], together[mate.request_id].sequences
        assert got.tokens == expected.tokens
    again, _ = stream_all(engine, bound)
    assert [s.tokens for s in again["bound"].sequences] == [s.tokens for s in together["bound"].sequences]
    assert {s.stop_reason for s in again["bound"].sequences} == {"length"}


def test_logprobs_of_a_constrained_sample_are_the_free_models(load):
    engine = constrained(load, Steps(*[set(range(50, 90))] * 40))
    results, _ = stream_all(engine, request(structured=SOMETHING, max_tokens=30))
    (sequence,) = results["q"].sequences
    engine.init_run("base", rank=1, seed=0)
    whole = [*PROMPT, *sequence.tokens]
    forward = engine.forward("base", [tiny_models.next_token_datum(whole)], "cross_entropy", {})
    assert sequence.logprobs == pytest.approx(list(forward.logprobs[0].values())[len(PROMPT) - 1 :], abs=1e-4)


def test_a_grammar_that_fails_ends_its_own_request(load):
    engine = constrained(load, Steps(*[{10, 11}] * 40, fails_after=3))
    engine.submit_sample(request("bad", num_samples=3, structured=SOMETHING), stream=True)
    engine.submit_sample(request("good"))
    finished, failed = [], []
    while engine.num_sampling:
        finished += engine.sample_step()
        failed += engine.take_failed_samples()
    assert [r.request_id for r in finished] == ["good"]
    ((failed_id, error),) = failed
    assert (failed_id, error.error_class) == ("bad", "BadRequest")
    assert "too complex" in str(error)
    assert engine._scheduler._pool.num_available == engine._scheduler._pool.num_pages


def test_what_no_token_can_begin_is_refused(load):
    with pytest.raises(OperationFailed, match="structured_outputs"):
        constrained(load, Steps(set(), {10})).submit_sample(request(structured=SOMETHING))
    with pytest.raises(BadRequest, match="structured_outputs"):
        constrained(load, Steps()).submit_sample(request(structured=SOMETHING))
    with pytest.raises(BadRequest, match="structured_outputs"):
        load().submit_sample(request(structured=SOMETHING))


def test_ends_are_allowed_where_the_text_is_whole():
    class Whole(Place):
        def is_accepting(self):
            return self.at == 1

    class Grammar(Steps):
        def start(self):
            return Whole(self)

    constraint = Constraint(Grammar({4, 5}, {5, 6}), 8, frozenset({2, 6}), frozenset({2, 5, 7}))
    assert constraint.mask_V.nonzero().flatten().tolist() == [4, 5]
    constraint.accept(4)
    assert not constraint.must_end
    assert constraint.mask_V.nonzero().flatten().tolist() == [2, 5, 7]


def test_bits_that_are_missing_are_not_allowed():
    assert unpack_bits(bytes([0b101, 0b10]), 12).nonzero().flatten().tolist() == [0, 2, 9]
    assert unpack_bits(bytes([0xFF]), 12).tolist() == [True] * 8 + [False] * 4
    assert unpack_bits(bytes([0xFF]), 3).dtype == torch.bool

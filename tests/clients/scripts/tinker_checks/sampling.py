"""Samples: ends, seeds, logprobs, many at a time."""

import numpy as np
from shared import EOS, VOCAB_SIZE, base_sampler, close, datum, ids, logprobs, prompt, sampled, step, trainer
from tinker import types

PROMPT = ids(6, 8)


def _sample(**params):
    num = params.pop("num_samples", 1)
    options = {name: params.pop(name) for name in list(params) if name.startswith(("include_", "topk_", "prompt_"))}
    return base_sampler().sample(prompt(PROMPT), num, types.SamplingParams(**params), **options).result()


def check_shapes_and_ids() -> None:
    response = _sample(max_tokens=6, num_samples=4, stop=[])
    assert len(response.sequences) == 4
    assert len({s.sequence_id for s in response.sequences}) == 4
    for sequence in response.sequences:
        assert sequence.stop_reason == "length"
        assert len(sequence.tokens) == len(sequence.logprobs) == 6
        assert all(0 <= token < VOCAB_SIZE for token in sequence.tokens)


def check_seeds_reproduce() -> None:
    first, again, other = (_sample(max_tokens=8, seed=seed, num_samples=2, stop=[]) for seed in (3, 3, 4))
    assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]
    assert [s.tokens for s in first.sequences] != [s.tokens for s in other.sequences]
    assert first.sequences[0].tokens != first.sequences[1].tokens


def check_logprobs_are_untempered() -> None:
    (sequence,) = _sample(max_tokens=5, temperature=0.5, seed=1, stop=[]).sequences
    everything = sampled(base_sampler(), PROMPT + list(sequence.tokens))
    close(sequence.logprobs, everything[len(PROMPT) - 1 :])


def check_the_stop_token_is_returned() -> None:
    (free,) = _sample(max_tokens=8, seed=5, stop=[]).sequences
    stop = free.tokens[3]
    cut = free.tokens.index(stop) + 1
    (sequence,) = _sample(max_tokens=8, seed=5, stop=[stop]).sequences
    assert sequence.tokens == free.tokens[:cut]
    assert sequence.stop_reason == "stop"
    assert len(sequence.logprobs) == cut


def check_what_ends_a_sample() -> None:
    """The model's own end token without a stop list; with one, even an empty one, only what it names."""
    client = trainer()
    text = [*ids(7, 6), EOS, *ids(8, 4)]
    for _ in range(15):
        step(client, datum(text))
    sampler = client.save_weights_and_get_sampling_client().result()
    start = prompt(text[:3])

    def tokens(**params) -> list[int]:
        asked = types.SamplingParams(max_tokens=7, temperature=0.0, **params)
        return list(sampler.sample(start, 1, asked).result().sequences[0].tokens)

    assert tokens() == text[3:7], tokens()
    assert tokens(stop=[]) == text[3:10], tokens(stop=[])
    assert tokens(stop=[text[4]]) == text[3:5]


def check_stop_strings() -> None:
    letters = [3 + ord(c) - 33 for c in "ABCD"]
    client = trainer()
    for _ in range(15):
        step(client, datum([*letters, *letters]))
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=6, temperature=0.0, stop=["CD"])
    (sequence,) = sampler.sample(prompt(letters[:1]), 1, params).result().sequences
    assert sequence.tokens == letters[1:], (sequence, letters)
    assert sequence.stop_reason == "stop"


def check_prompt_logprobs() -> None:
    response = _sample(max_tokens=1, include_prompt_logprobs=True, topk_prompt_logprobs=5)
    own, top = response.prompt_logprobs, response.topk_prompt_logprobs
    assert own[0] is None
    assert top[0] is None
    assert len(own) == len(top) == len(PROMPT)
    for token, logprob, row in zip(PROMPT[1:], own[1:], top[1:], strict=True):
        values = [value for _, value in row]
        assert len(row) == 5
        assert values == sorted(values, reverse=True)
        if token in dict(row):
            assert abs(dict(row)[token] - logprob) < 1e-5
        else:
            assert logprob <= values[-1]


def check_last_prompt_logprobs() -> None:
    all_of_them = sampled(base_sampler(), PROMPT)
    last = _sample(max_tokens=1, include_prompt_logprobs=True, prompt_logprobs_last_n=3).prompt_logprobs
    assert last[:-3] == [None] * (len(PROMPT) - 3)
    close(last[-3:], all_of_them[-3:])


def check_top_logprobs_of_samples() -> None:
    (sequence,) = _sample(max_tokens=4, temperature=0.0, stop=[], topk_sample_logprobs=3).sequences
    top = sequence.topk_logprobs
    assert [len(row) for row in top] == [3] * 4, top
    assert [row[0][0] for row in top] == sequence.tokens
    close([row[0][1] for row in top], sequence.logprobs)


def check_greedy_is_the_likeliest() -> None:
    (sequence,) = _sample(max_tokens=1, temperature=0.0, stop=[]).sequences
    _, top = _sample(max_tokens=1, include_prompt_logprobs=True), base_sampler()
    row = top.sample(
        prompt([*PROMPT, 5]),
        1,
        types.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=1,
    ).result()
    assert row.topk_prompt_logprobs[-1][0][0] == sequence.tokens[0]


def check_the_base_model_beside_a_trained_one() -> None:
    base = sampled(base_sampler())
    client = trainer()
    untrained = logprobs(client)
    for _ in range(3):
        step(client, datum(ids(1)))
    sampler = client.save_weights_and_get_sampling_client().result()
    futures = [s.compute_logprobs(prompt(ids(99))) for s in (base_sampler(), sampler) * 4]
    found = [np.array(f.result()[1:]) for f in futures]
    for of_base, of_tuned in zip(found[::2], found[1::2], strict=True):
        close(of_base, base)
        close(of_base, untrained)
        close(of_tuned, logprobs(client))


def check_many_at_a_time() -> None:
    params = types.SamplingParams(max_tokens=3, stop=[])
    futures = [base_sampler().sample(prompt(PROMPT), 1, params) for _ in range(200)]
    assert {len(f.result().sequences[0].tokens) for f in futures} == {3}

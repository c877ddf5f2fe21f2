"""Samples: ends, seeds, logprobs, many at a time."""

import asyncio
import pickle

import numpy as np
import tinker
from shared import (
    EOS,
    MODEL,
    VOCAB_SIZE,
    base_sampler,
    close,
    datum,
    ids,
    logprobs,
    prompt,
    sampled,
    service,
    step,
    tensor,
    trainer,
)
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


def check_hundreds_at_a_time() -> None:
    params = types.SamplingParams(max_tokens=2, stop=[], seed=3)
    futures = [base_sampler().sample(prompt(PROMPT), 1, params) for _ in range(600)]
    assert len({tuple(f.result().sequences[0].tokens) for f in futures}) == 1


def check_target_prompt_logprobs() -> None:
    everything = sampled(base_sampler(), PROMPT)
    cells = np.full((len(PROMPT) - 1, 3), -1)
    cells[:, 1] = PROMPT[1:]
    cells[2, 0] = 7
    named = cells >= 0
    dense = tensor(cells, np.int64)
    sparse = types.TensorData(
        data=cells[named].tolist(),
        dtype="int64",
        shape=list(cells.shape),
        sparse_crow_indices=[0, *named.sum(1).cumsum().tolist()],
        sparse_col_indices=named.nonzero()[1].tolist(),
    )
    one = types.SamplingParams(max_tokens=1)
    found, of_sparse = (
        base_sampler().sample(prompt(PROMPT), 1, one, target_prompt_logprobs=asked).result().target_prompt_logprobs
        for asked in (dense, sparse)
    )
    logprobs_of = found.to_numpy()
    assert logprobs_of.shape == cells.shape
    close(logprobs_of[:, 1], everything)
    assert logprobs_of[2, 0] < 0
    assert (logprobs_of[~named] == 0).all()
    assert of_sparse.sparse_crow_indices == sparse.sparse_crow_indices
    assert of_sparse.sparse_col_indices == sparse.sparse_col_indices
    close(of_sparse.data, logprobs_of[named])


def check_alternatives_to_the_prompt() -> None:
    response = _sample(max_tokens=1, seed=1, prompt_alt_tokens_k=5, topk_prompt_logprobs=128)
    given = response.prompt_alt_tokens
    tokens, values = given.tokens.to_numpy(), given.logprobs.to_numpy()
    assert tokens.shape == values.shape == (len(PROMPT) - 1, 5)
    for row, top, logprobs_of in zip(response.topk_prompt_logprobs[1:], tokens, values, strict=True):
        known = dict(row)
        for token, value in zip(top.tolist(), logprobs_of.tolist(), strict=True):
            assert token not in known or abs(known[token] - value) < 1e-5
    assert len({tuple(row) for row in tokens.tolist()}) > 1


def check_a_pickled_client_samples() -> None:
    params = types.SamplingParams(max_tokens=4, stop=[], seed=9)
    copies = [pickle.loads(pickle.dumps(base_sampler())) for _ in range(2)]
    clients = [base_sampler(), *copies]
    answers = [client.sample(prompt(PROMPT), 1, params).result().sequences[0] for client in clients]
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert len({answer.sequence_id for answer in answers}) == 3


def check_an_abandoned_sample_is_cancelled() -> None:
    """With the engine full of what nobody waits for, the next sample would take its turn behind it."""

    async def abandon() -> None:
        params = types.SamplingParams(max_tokens=200, stop=[])
        for _ in range(4):
            try:
                await asyncio.wait_for(base_sampler().sample_async(prompt(PROMPT), 64, params), 0.3)
            except TimeoutError:
                continue

    asyncio.run(abandon())
    assert len(_sample(max_tokens=2, stop=[]).sequences[0].tokens) == 2


def check_inflight_clients_follow_the_training() -> None:
    client = trainer()
    first = client.save_weights_and_get_sampling_client(kind="inflight").result()
    before = sampled(first)
    close(before, logprobs(client))
    running = first.sample(prompt(PROMPT), 4, types.SamplingParams(max_tokens=60, stop=[]))
    step(client, datum(ids(1)))
    second = client.save_weights_and_get_sampling_client(kind="inflight").result()
    close(sampled(second), logprobs(client))
    close(sampled(first), logprobs(client))
    assert np.abs(sampled(first) - before).max() > 1e-3
    assert [len(sequence.tokens) for sequence in running.result().sequences] == [60] * 4


def check_named_weights_outlive_their_session() -> None:
    own = tinker.ServiceClient()
    client = own.create_lora_training_client(base_model=MODEL, rank=4).result()
    kept = client.save_weights_for_sampler("kept").result().path
    snapshot = client.save_weights_and_get_sampling_client().result()
    before = sampled(snapshot)
    own.close("success").result()
    close(sampled(service().create_sampling_client(model_path=kept).result()), before)

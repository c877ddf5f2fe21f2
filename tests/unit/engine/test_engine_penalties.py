"""Penalties and biases: whole samples beside a plain loop over transformers' logits, whatever else is in the batch."""

import itertools
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from selfloop.engine.backends.base import Row
from selfloop.engine.backends.cpu_native import draw as native_draw
from selfloop.engine.backends.cpu_native.draw import draw
from selfloop.engine.sample.sampler import sample_generator
from selfloop.types.sampling import SampleRequest, SamplingParams

PROMPT = [*tiny_models.random_ids(6, seed=1), 5, 5]
CASES = {
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.5},
    "both, below zero": {"frequency_penalty": -0.3, "presence_penalty": -1.0},
    "repetition": {"repetition_penalty": 1.8},
    "repetition below one": {"repetition_penalty": 0.8},
    "bias": {"logit_bias": {3: 4.0, 7: -100.0, 11: 2.5}},
    "a token alone": {"logit_bias": {9: 100.0}},
    "min_p": {"min_p": 0.2},
    "all": {
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {3: 2.0, 5: -1.0},
        "min_p": 0.05,
        "top_p": 0.9,
        "top_k": 40,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that a second thread only costs."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def reference(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(params=["kernels", "operators"])
def engine(request, load, monkeypatch):
    if request.param == "operators":
        monkeypatch.setattr(native_draw, "kernels", lambda: None)
    made = load()
    # Every sample is as long as it may be.
    made._scheduler._end_tokens = frozenset()
    return made


def by_definition(logits, params, prompt, drawn):
    """The distribution of the next token, a dictionary from a token to its probability, in plain Python floats."""
    counts = Counter(drawn)
    logits = {token: value + params.logit_bias.get(token, 0.0) for token, value in enumerate(logits.tolist())}
    for token in {*prompt, *drawn} & logits.keys():
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    for token, count in counts.items():
        logits[token] -= count * params.frequency_penalty + params.presence_penalty
    if params.temperature == 0:
        return {max(logits, key=lambda token: logits[token]): 1.0}
    scaled = torch.tensor(list(logits.values()), dtype=torch.float64) / params.temperature
    probs = dict(enumerate(scaled.softmax(0).tolist()))
    kept = sorted((t for t in probs if probs[t] >= params.min_p * max(probs.values())), key=lambda t: -probs[t])
    kept = kept[: params.top_k or len(kept)]
    whole, total, nucleus = sum(probs[t] for t in kept), 0.0, []
    for token in kept:
        if nucleus and total >= params.top_p * whole:
            break
        nucleus.append(token)
        total += probs[token]
    if params.min_p == 0 and params.top_k == 0 and params.top_p == 1:
        nucleus.sort()
    return {token: probs[token] / total for token in nucleus}


def sampled(reference, params, prompt):
    """A whole sample by the definition: at each place the token that the sample's own next number falls on."""
    drawn = []
    generator = sample_generator(params.seed, 0)
    for _ in range(params.max_tokens):
        with torch.no_grad():
            logits = reference(torch.tensor([[*prompt, *drawn]])).logits[0, -1]
        uniform = float(torch.rand((), dtype=torch.float64, generator=generator))
        tokens, probabilities = zip(*by_definition(logits, params, prompt, drawn).items(), strict=True)
        below = sum(total <= uniform for total in itertools.accumulate(probabilities))
        drawn.append(tokens[min(below, len(tokens) - 1)])
    return drawn


def run(engine, *requests):
    for request in requests:
        engine.submit_sample(request)
    results = {}
    while engine.num_sampling:
        results |= {result.request_id: result for result in engine.sample_step()}
    return results


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_the_definition(engine, reference, case, temperature):
    params = SamplingParams(max_tokens=30, seed=4, temperature=temperature, **CASES[case])
    mates = [
        SampleRequest("plain", PROMPT, 2, SamplingParams(max_tokens=30, seed=1)),
        SampleRequest("other", PROMPT[:3], 1, SamplingParams(max_tokens=20, seed=2, frequency_penalty=1.0)),
    ]
    alone = run(engine, SampleRequest("q", PROMPT, 1, params))["q"]
    assert alone.sequences[0].tokens == sampled(reference, params, PROMPT)
    together = run(engine, mates[0], SampleRequest("q", PROMPT, 1, params), mates[1])
    assert together["q"].sequences[0].tokens == alone.sequences[0].tokens
    plain = run(engine, mates[0])["plain"]
    assert [s.tokens for s in together["plain"].sequences] == [s.tokens for s in plain.sequences]


def test_they_change_something(engine):
    plain = run(engine, SampleRequest("q", PROMPT, 1, SamplingParams(max_tokens=30, seed=4)))["q"].sequences[0]
    for case, fields in CASES.items():
        params = SamplingParams(max_tokens=30, seed=4, **fields)
        assert run(engine, SampleRequest("q", PROMPT, 1, params))["q"].sequences[0].tokens != plain.tokens, case


def test_logprobs_stay_those_of_the_model(engine, reference):
    params = SamplingParams(max_tokens=20, seed=4, frequency_penalty=2.0, logit_bias={3: 5.0})
    sequence = run(engine, SampleRequest("q", PROMPT, 1, params))["q"].sequences[0]
    with torch.no_grad():
        logits = reference(torch.tensor([[*PROMPT, *sequence.tokens]])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sequence.tokens)[:, None]).squeeze(1)
    assert sequence.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_more_different_tokens_than_there_is_room_for_at_first(engine):
    """Each token may come once: a permutation of the vocabulary."""
    params = SamplingParams(max_tokens=tiny_models.VOCAB_SIZE, seed=4, presence_penalty=1e4)
    sequence = run(engine, SampleRequest("q", PROMPT[:1], 1, params))["q"].sequences[0]
    assert sorted(sequence.tokens) == list(range(tiny_models.VOCAB_SIZE))


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_looks_beyond_the_likeliest_thousand_where_it_must(min_p):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(2)) * 0.5
    drawn = draw(logits[None], [Row(SamplingParams(max_tokens=1, min_p=min_p), 1 - 2**-40)]).tokens[0]
    probs, order = logits.double().softmax(-1).sort(descending=True)
    assert drawn == int(order[int((probs >= min_p * probs[0]).sum()) - 1])

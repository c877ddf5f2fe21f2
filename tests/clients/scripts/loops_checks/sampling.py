"""Sampling parameters, and the agreement of sampler and trainer."""

import json
import math

from baseten.loops import (
    ModelInput,
    SampleResponse,
    SamplingParams,
)
from shared import MODEL, base_sampler, close, ids, logprobs, prompt_of, tokenizer
from training import trained


def sample(prompt: list[int] | None = None, n: int = 1, **params: object) -> SampleResponse:
    sampling = SamplingParams(**({"max_tokens": 12} | params))
    return base_sampler().sample(ModelInput.from_ints(prompt or ids(1)), n, sampling)


def tokens_of(*arguments: object, **params: object) -> list[list[int]]:
    return [sequence.tokens for sequence in sample(*arguments, **params).sequences]


def check_several_samples():
    response = sample(n=5, seed=3)
    assert len({tuple(s.tokens) for s in response.sequences}) == 5
    for sequence in response.sequences:
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert sequence.stop_reason == ("stop" if sequence.tokens[-1] == 2 else "length")
        assert sequence.stop_reason == "stop" or len(sequence.tokens) == 12


def check_seed_reproduces():
    assert tokens_of(n=3, seed=3) == tokens_of(n=3, seed=3)
    assert tokens_of(n=3, seed=3) != tokens_of(n=3, seed=4)
    assert tokens_of(n=3, seed=3)[0] == tokens_of(n=1, seed=3)[0]
    assert tokens_of() != tokens_of()


def check_temperature_zero_is_greedy():
    first = tokens_of(n=2, temperature=0.0)
    assert first[0] == first[1] == tokens_of(temperature=0.0, seed=9)[0]
    assert tokens_of(top_k=1, seed=1)[0] == first[0]
    assert tokens_of(top_p=1e-6, seed=1)[0] == first[0]


def check_stop_string():
    (free,) = sample(seed=3, temperature=0.7, max_tokens=30).sequences
    at = next(i for i in range(2, len(free.text)) if free.text[i].isascii() and free.text[i].isprintable())
    stop = free.text[at]
    (stopped,) = sample(seed=3, temperature=0.7, max_tokens=30, stop=[stop, "no such text"]).sequences
    assert stopped.stop_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert stop in tokenizer().decode(stopped.tokens)
    assert sample(seed=3, temperature=0.7, max_tokens=30, stop=stop).sequences[0].tokens == stopped.tokens


def check_stop_ids():
    (free,) = tokens_of(seed=3)
    (stopped,) = sample(seed=3, stop=[free[4], 0]).sequences
    assert stopped.stop_reason == "stop"
    assert stopped.tokens == free[: free.index(free[4]) + 1]


def check_structured_outputs():
    def texts(**structured: object) -> list[str]:
        sequences = sample(n=3, seed=2, max_tokens=80, structured_outputs=structured).sequences
        assert {sequence.stop_reason for sequence in sequences} == {"stop"}
        return [sequence.text for sequence in sequences]

    assert set(texts(choice=["yes", "no"])) <= {"yes", "no"}
    assert all(text.isdigit() and len(text) == 4 for text in texts(regex="[0-9]{4}"))
    schema = {"enum": [{"city": "Oslo"}, {"city": "Rome"}]}
    for given in (schema, json.dumps(schema)):
        assert {json.loads(text)["city"] for text in texts(json=given)} <= {"Oslo", "Rome"}
    assert set(texts(grammar='start: "a" | "b"')) <= {"a", "b"}


def check_top_prompt_logprobs():
    prompt = ids(1)
    response = base_sampler().sample(
        ModelInput.from_ints(prompt), 1, SamplingParams(max_tokens=1), True, topk_prompt_logprobs=3
    )
    assert response.prompt_token_ids == prompt
    assert response.prompt_logprobs[0] is None
    assert response.topk_prompt_logprobs[0] is None
    for own, top in zip(response.prompt_logprobs[1:], response.topk_prompt_logprobs[1:], strict=True):
        assert len(top) in (3, 4), top
        best = sorted((value for _, value in top), reverse=True)
        assert own <= best[0] + 1e-6
        assert sum(math.exp(value) for value in best[:3]) <= 1 + 1e-6


def check_sampler_and_trainer_agree():
    client, _loss, _path = trained()
    sampler = client.save_weights_and_get_sampling_client("parity")
    for tokens in (ids(7, 60), ids(8, 3), prompt_of("Hi")):
        seen = sampler.compute_logprobs(ModelInput.from_ints(tokens))
        assert seen[0] is None
        close(seen[1:], logprobs(client, tokens), 1e-4)
    prompt = prompt_of("Who?")
    response = sampler.sample(ModelInput.from_ints(prompt), 4, SamplingParams(max_tokens=24, temperature=1.3, seed=1))
    for sequence in response.sequences:
        scored = logprobs(client, prompt + sequence.tokens)
        close(sequence.logprobs, scored[len(prompt) - 1 :], 1e-4)


def check_model_list_of_a_sampler():
    client, _loss, _path = trained()
    sampler = client.save_weights_and_get_sampling_client("listed")
    assert sampler.discover_base_model_name() == MODEL
    assert sampler.discover_adapter_name().startswith(f"bt://loops:{client.run_id}/sampler_weights/")
    assert base_sampler().discover_adapter_name() is None

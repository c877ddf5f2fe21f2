"""What is asked about a prompt, against the logits of transformers; padding of the vocabulary."""

from array import array

import pytest
import torch
from test_engine_sampling import run_all
from transformers import AutoModelForCausalLM

import tiny_models
from selfloop.types.errors import BadRequest
from selfloop.types.sampling import PromptTargets, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits

PROMPT = tiny_models.random_ids(20, seed=4)
NUM_ROWS = len(PROMPT) - 1
REAL = 60


@pytest.fixture(scope="module")
def logprobs_NV(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)


class FewTokens:
    """A tokenizer of fewer ids than the model has."""

    num_tokens = REAL
    drops_first_space = False

    def token_bytes(self, token: int) -> bytes:
        return b"x"

    text_bytes = token_bytes


def asked(engine, *, temperature=1.0, seed=3, prompt=PROMPT, **fields):
    params = SamplingParams(max_tokens=1, temperature=temperature, seed=seed)
    return run_all(engine, SampleRequest("q", prompt, 1, params, **fields))["q"]


def targets_of(rows):
    starts = [sum(map(len, rows[:i])) for i in range(len(rows) + 1)]
    return PromptTargets(array("q", starts).tobytes(), array("i", [t for row in rows for t in row]).tobytes())


@pytest.fixture(params=[512, 6], ids=["at once", "in parts"])
def any_engine(load, request):
    return load(limits=EngineLimits(train_token_budget=request.param))


def test_named_tokens(any_engine, logprobs_NV):
    rows = [[] if i % 3 == 0 else [i, -1, 90 - i] for i in range(NUM_ROWS)]
    result = asked(any_engine, prompt_targets=targets_of(rows))
    assert result.prompt_logprobs is None
    expected = [0.0 if t < 0 else float(logprobs_NV[i, t]) for i, row in enumerate(rows) for t in row]
    assert list(array("f", result.target_logprobs)) == pytest.approx(expected, abs=1e-4)


def test_only_rows_that_are_asked_for_are_computed(load, monkeypatch):
    engine = load(limits=EngineLimits(train_token_budget=512))
    model = engine._model
    counted = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda h, *more: counted.append(len(h)) or logits(h, *more))
    asked(engine, prompt_logprobs=0, prompt_logprobs_last_n=4)
    assert sum(counted) == 4 + 1
    counted.clear()
    asked(engine, prompt_targets=targets_of([[]] * (NUM_ROWS - 2) + [[5], [-1]]))
    assert sum(counted) == 1 + 1


@pytest.mark.parametrize("last_n", [1, 7, NUM_ROWS])
def test_the_last_positions(any_engine, logprobs_NV, last_n):
    positions = asked(any_engine, prompt_logprobs=2, prompt_logprobs_last_n=last_n).prompt_logprobs
    assert positions[: len(PROMPT) - last_n] == [None] * (len(PROMPT) - last_n)
    for at in range(len(PROMPT) - last_n, len(PROMPT)):
        own, *others = positions[at]
        assert own.token == PROMPT[at]
        assert own.logprob == pytest.approx(float(logprobs_NV[at - 1, PROMPT[at]]), abs=1e-4)
        assert len(others) == 2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_tempered_distribution(any_engine, logprobs_NV, temperature):
    k = 4000
    draws = asked(any_engine, prompt_draws=k, temperature=temperature).prompt_draws
    tokens = torch.tensor(array("i", draws.tokens)).view(NUM_ROWS, k)
    logprobs = torch.tensor(array("f", draws.logprobs)).view(NUM_ROWS, k)
    torch.testing.assert_close(logprobs, logprobs_NV.gather(1, tokens), atol=1e-4, rtol=1e-4)
    expected_NV = (logprobs_NV / temperature).softmax(-1)
    seen_NV = torch.nn.functional.one_hot(tokens, tiny_models.VOCAB_SIZE).float().mean(1)
    # Six standard deviations of a share.
    assert ((seen_NV - expected_NV).abs() < 6 * (expected_NV / k).sqrt() + 1e-3).all()


def test_draws_are_reproduced_and_greedy_at_zero(engine, logprobs_NV):
    first, again, other = (asked(engine, prompt_draws=5, seed=seed).prompt_draws for seed in (1, 1, 2))
    assert first == again != other
    greedy = asked(engine, prompt_draws=3, temperature=0.0).prompt_draws
    assert list(array("i", greedy.tokens)) == logprobs_NV.argmax(-1).repeat_interleave(3).tolist()


def test_a_prompt_of_one_token_has_nothing_to_score(engine):
    result = asked(engine, prompt=PROMPT[:1], prompt_logprobs=1, prompt_draws=2, prompt_targets=targets_of([]))
    assert result.prompt_logprobs == [None]
    assert result.target_logprobs == b""
    assert result.prompt_draws.tokens == b""


def test_padding_of_the_vocabulary_is_never_drawn_nor_likeliest(load, logprobs_NV):
    engine = load(vocabulary=FewTokens())
    prompt = [t % REAL for t in PROMPT]
    params = SamplingParams(max_tokens=30, seed=1, temperature=3.0)
    request = SampleRequest("q", prompt, 20, params, prompt_logprobs=90, top_logprobs=90, prompt_draws=200)
    result = run_all(engine, request)["q"]
    assert max(token for sequence in result.sequences for token in sequence.tokens) < REAL
    tops = [p for s in result.sequences for p in s.top_logprobs] + result.prompt_logprobs[1:]
    assert max(t.token for position in tops for t in position) < REAL
    assert max(array("i", result.prompt_draws.tokens)) < REAL
    # What is reported of a token stays the model's own: its share of all ids, padding included.
    whole = asked(load(), prompt=prompt, prompt_logprobs=0).prompt_logprobs
    assert [p[0].logprob for p in result.prompt_logprobs[1:]] == pytest.approx([p[0].logprob for p in whole[1:]])


def test_a_prompt_that_fills_the_context(any_engine, model_dir):
    """Only one that is scored; of one that is to go on the next token has no place."""
    length = any_engine.info.max_position_embeddings
    prompt = tiny_models.random_ids(length, seed=9)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs_NV = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    result = asked(any_engine, prompt=prompt, prompt_logprobs=0)
    own = [position[0].logprob for position in result.prompt_logprobs[1:]]
    expected = logprobs_NV.gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1).tolist()
    assert own == pytest.approx(expected, abs=1e-3)
    with pytest.raises(BadRequest, match="max_tokens"):
        asked(any_engine, prompt=prompt)
    with pytest.raises(BadRequest, match="max_tokens"):
        asked(any_engine, prompt=[*prompt, 3], prompt_logprobs=0)

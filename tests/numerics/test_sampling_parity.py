"""Sampling against transformers' generate and against the trainer's own logprobs."""

import pytest
import torch

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits


def run_all(engine, *requests):
    for request in requests:
        engine.submit_sample(request)
    results = {}
    while engine.num_sampling:
        results.update({r.request_id: r for r in engine.sample_step()})
    engine._scheduler._pool.check_integrity()
    assert engine._scheduler._pool.num_available == engine._scheduler._pool.num_pages
    return results


def train(engine, run_id, rank, seed):
    engine.init_run(run_id, rank=rank, seed=seed, targets=LoraTargets(experts=True))
    for step in range(4):
        data = [tiny_models.next_token_datum(tiny_models.random_ids(20, seed=seed + step))]
        engine.forward_backward(run_id, data, "cross_entropy", {})
        engine.optim_step(run_id, AdamParams(learning_rate=2e-2))
    engine.publish(run_id, f"{run_id}-final")
    return AdapterRef(f"{run_id}-final")


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama-tied",
        "llama3-rope",
        "llama-yarn",
        "qwen2",
        "qwen3",
        "mistral",
        "mistral-window",
        "gemma2-own",
        "gemma3-own",
        "glm4",
        "olmo3",
        "granite-own",
        "qwen3_5-own",
        *tiny_models.MOE_FAMILIES,
    ],
)
def test_greedy_equals_transformers_generate(zoo, family):
    engine = zoo.engine(family)
    prompts = [tiny_models.random_ids(n, seed=n) for n in (1, 5, 16, 40)]
    params = SamplingParams(max_tokens=40, temperature=0)
    results = run_all(engine, *[SampleRequest(str(i), p, 1, params) for i, p in enumerate(prompts)])
    model = zoo.reference(family)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=tiny_models.EOS,
        )
        assert results[str(i)].sequences[0].tokens == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prefill_budget", [8, 512])
@pytest.mark.parametrize("family", ["llama-tied", "qwen3", *tiny_models.MOE_FAMILIES])
def test_sampled_logprobs_equal_the_trainers(zoo, family, prefill_budget):
    engine = zoo.engine(family, limits=EngineLimits(train_token_budget=prefill_budget))
    adapter = train(engine, "run", rank=4, seed=1)
    prompt = tiny_models.random_ids(21, seed=5)
    params = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, seed=11)
    request = SampleRequest("q", prompt, 3, params, adapter, prompt_logprobs=0)
    result = run_all(engine, request)["q"]
    for sequence in result.sequences:
        whole = prompt + sequence.tokens
        forward = engine.forward("run", [tiny_models.next_token_datum(whole)], "cross_entropy", {})
        trainer = list(forward.logprobs[0].values())
        assert sequence.logprobs == pytest.approx(trainer[len(prompt) - 1 :], abs=1e-4)
        assert result.prompt_logprobs[0] is None
        shown = [position[0].logprob for position in result.prompt_logprobs[1:]]
        assert shown == pytest.approx(trainer[: len(prompt) - 1], abs=1e-4)
        assert [position[0].token for position in result.prompt_logprobs[1:]] == prompt[1:]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-9), ("bfloat16", 2e-4)])
def test_divergence_of_sampler_and_trainer_at_the_first_step(tmp_path, dtype, bound):
    """Half the mean squared difference of the logprobs of what was sampled, an estimate of KL."""
    model = tiny_models.save("llama-tied", tmp_path / "model")
    engine = Engine.load(model, device="cpu", dtype=dtype, limits=EngineLimits(max_kv_tokens=8192))
    engine.init_run("run", rank=8, seed=1)
    engine._runs["run"].theta_P.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    engine.publish("run", "run-final")
    prompts = [tiny_models.random_ids(5 + i % 20, seed=i) for i in range(64)]
    params = SamplingParams(max_tokens=16, seed=1, use_end_tokens=False)
    adapter = AdapterRef("run-final")
    results = run_all(engine, *[SampleRequest(str(i), p, 1, params, adapter) for i, p in enumerate(prompts)])
    data, sampled = [], []
    for i, prompt in enumerate(prompts):
        (sequence,) = results[str(i)].sequences
        data.append(tiny_models.next_token_datum(prompt + sequence.tokens))
        sampled += sequence.logprobs
    forward = engine.forward("run", data, "cross_entropy", {})
    trained = [x for p, row in zip(prompts, forward.logprobs, strict=True) for x in list(row.values())[len(p) - 1 :]]
    drift = torch.tensor(sampled) - torch.tensor(trained)
    assert float(drift.square().mean()) / 2 < bound
    assert abs(float(drift.mean())) < 2e-3


@pytest.mark.parametrize("family", ["qwen2", "qwen3-moe"])
def test_adapters_of_different_rank_in_one_batch_equal_each_alone(zoo, family):
    engine = zoo.engine(family)
    small, large = train(engine, "small", rank=2, seed=1), train(engine, "large", rank=8, seed=50)
    params = SamplingParams(max_tokens=30, seed=4)
    requests = [
        SampleRequest(f"{i}", tiny_models.random_ids(10 + i, seed=i), 2, params, adapter)
        for i, adapter in enumerate([small, None, large, small, None, large])
    ]
    together = run_all(engine, *requests)
    for request in requests:
        alone = run_all(engine, request)[request.request_id]
        mixed = together[request.request_id]
        for a, b in zip(alone.sequences, mixed.sequences, strict=True):
            assert a.tokens == b.tokens
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert together["0"].sequences[0].tokens != together["2"].sequences[0].tokens


def test_prompt_logprobs_rank_the_actual_token(zoo):
    engine = zoo.engine("llama")
    prompt = tiny_models.random_ids(9, seed=3)
    request = SampleRequest("q", prompt, 1, SamplingParams(max_tokens=1), prompt_logprobs=3)
    shown = run_all(engine, request)["q"].prompt_logprobs
    with torch.no_grad():
        log_softmax = zoo.reference("llama")(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert shown[0] is None
    for position in range(1, len(prompt)):
        row = log_softmax[position - 1]
        order = row.argsort(descending=True).tolist()
        actual, *others = shown[position]
        assert actual.token == prompt[position]
        assert actual.rank == order.index(actual.token) + 1
        expected = [token for token in order if token != actual.token][:3]
        assert [o.token for o in others] == expected
        for entry in (actual, *others):
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
            assert order[entry.rank - 1] == entry.token


def test_top_logprobs_equal_transformers(zoo):
    engine = zoo.engine("qwen3")
    prompt = tiny_models.random_ids(9, seed=3)
    params = SamplingParams(max_tokens=20, temperature=2.0, top_k=30, seed=5)
    (sequence,) = run_all(engine, SampleRequest("q", prompt, 1, params, top_logprobs=4))["q"].sequences
    with torch.no_grad():
        logits = zoo.reference("qwen3")(input_ids=torch.tensor([[*prompt, *sequence.tokens]])).logits[0]
    rows = logits.log_softmax(-1)[len(prompt) - 1 :]
    for row, token, logprob, top in zip(rows, sequence.tokens, sequence.logprobs, sequence.top_logprobs, strict=False):
        values, order = row.topk(4)
        assert [t.token for t in top] == order.tolist()
        assert [t.logprob for t in top] == pytest.approx(values.tolist(), abs=1e-4)
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)

"""What the trainer makes of a short text when its weights are published, and the sampler of the same."""

import math

import pytest
import torch

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.train.forward_cache import ForwardCache
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams


def train(engine, learning_rate=1e-2):
    data = [tiny_models.next_token_datum(tiny_models.random_ids(9 + 3 * i, seed=i)) for i in range(3)]
    engine.forward_backward("run", data, "cross_entropy", {})
    engine.optim_step("run", AdamParams(learning_rate=learning_rate))
    return data


def sampled(engine, probe, checkpoint_id):
    params = SamplingParams(1, temperature=0.0)
    engine.submit_sample(SampleRequest("ask", probe.tokens, 1, params, AdapterRef(checkpoint_id), prompt_logprobs=0))
    while not (done := engine.sample_step()):
        assert engine.num_sampling
    return [position[0].logprob for position in done[0].prompt_logprobs[1:]]


def gap(probe, logprobs):
    return sum(abs(a - b) for a, b in zip(logprobs, probe.logprobs, strict=True)) / len(logprobs)


def test_the_sampler_agrees_on_the_weights_that_were_published_and_on_no_others(load):
    engine = load()
    engine.init_run("run", rank=4, seed=0)
    engine.publish("run", "base")
    assert engine.probe("run").equals_base
    train(engine, learning_rate=0.1)
    engine.publish("run", "trained")
    probe = engine.probe("run")
    assert not probe.equals_base
    assert len(set(probe.tokens)) == 16
    assert 0 <= min(probe.tokens) < max(probe.tokens) < engine.info.vocab_size
    assert gap(probe, sampled(engine, probe, "trained")) < 1e-4 < probe.bound
    assert gap(probe, sampled(engine, probe, "base")) > probe.bound


def test_a_probe_touches_no_state(load, monkeypatch):
    """Not what is accumulated, not what a loss of the client's own has kept for its backward, not the step."""
    engine = load()
    engine.init_run("run", rank=4, seed=0)
    data = train(engine)
    engine.forward_backward("run", data, "cross_entropy", {})
    calls = []
    for name in ("begin_forward", "begin_backward", "put", "drop"):
        own = getattr(ForwardCache, name)
        monkeypatch.setattr(
            ForwardCache, name, lambda kept, *args, own=own, **more: calls.append(kept) or own(kept, *args, **more)
        )
    run = engine._runs["run"]
    before = run.theta_P.clone(), run.accumulated, run.accumulated.grad_P.clone(), run.moments, run.step
    engine.probe("run")
    assert calls
    assert engine._forward_cache not in calls
    assert torch.equal(run.theta_P, before[0])
    assert run.accumulated is before[1]
    assert torch.equal(run.accumulated.grad_P, before[2])
    assert (run.moments, run.step) == before[3:]


def test_weights_that_have_diverged_give_no_logprobs(load):
    engine = load()
    engine.init_run("run", rank=4, seed=0)
    engine._runs["run"].theta_P.fill_(math.inf)
    assert all(math.isnan(logprob) for logprob in engine.probe("run").logprobs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bound_goes_by_the_compute_type(model_dir, dtype):
    engine = Engine.load(model_dir, device="cpu", dtype=dtype)
    engine.init_run("run", rank=4, seed=0)
    train(engine)
    engine.publish("run", "trained")
    probe = engine.probe("run")
    assert probe.bound == {"float32": 1e-3, "bfloat16": 0.2}[dtype]
    assert gap(probe, sampled(engine, probe, "trained")) <= probe.bound

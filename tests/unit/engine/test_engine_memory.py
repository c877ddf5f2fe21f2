"""Activations: recomputed layer by layer where they would not fit."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_models
from selfloop.engine import device
from selfloop.engine.engine import Engine
from selfloop.engine.limits import EngineLimits
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.attention import PackedCausalAttention
from selfloop.engine.models.decoder import positions_of
from selfloop.types.datum import Datum, Tensor
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.operation import AdamParams, ForwardBackward


@pytest.fixture(scope="module")
def deep_dir(tmp_path_factory):
    """More layers than the other tiny models, for activations are a matter of layers; the kernels know its sizes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=96, num_hidden_layers=8, max_position_embeddings=1024, eos_token_id=2, **sizes)
    folder = tmp_path_factory.mktemp("deep")
    tiny_models.save_quietly(LlamaForCausalLM(config), folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_layers_give_the_same_bits(deep_dir, dtype):
    decoder = Engine.load(deep_dir, device="cpu", dtype=dtype)._decoder
    shape = AdapterShape(decoder.config, 4)
    theta_P = torch.randn(shape.num_parameters, generator=torch.Generator().manual_seed(1)) * 0.1
    lengths = [9, 17]

    def outcome(recompute):
        leaf_P = theta_P.to(decoder.dtype, copy=True).requires_grad_()
        h_TD = decoder.forward(
            torch.tensor(tiny_models.random_ids(sum(lengths), 0)),
            positions_of(lengths, decoder.device),
            PackedCausalAttention(lengths),
            AdapterBatch.of([(sum(lengths), shape.adapter(leaf_P, 8.0))]),
            recompute=recompute,
        )
        (grad_P,) = torch.autograd.grad(h_TD.float().square().sum(), leaf_P)
        return h_TD, grad_P

    for plain, recomputed in zip(outcome(False), outcome(True), strict=True):
        assert torch.equal(plain, recomputed)
        assert plain.abs().sum() > 0


def long_datum(num, seed=0):
    return tiny_models.next_token_datum(tiny_models.random_ids(num + 1, seed))


def load(folder, activation_bytes=None, *, dtype="float32", budget=64):
    limits = EngineLimits(train_token_budget=budget, activation_bytes=activation_bytes, kept_bytes=0)
    engine = Engine.load(folder, device="cpu", dtype=dtype, limits=limits)
    engine.init_run("run", rank=4, seed=0)
    theta_P = engine._runs["run"].theta_P
    theta_P.add_(torch.randn(theta_P.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return engine


def peak_bytes(act, folder):
    """The most that tensors took at a time beyond what they took before, as PyTorch's own profiler counts it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


@pytest.mark.parametrize("kind", ["forward", "kept", "recomputed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_takes_what_is_estimated(deep_dir, tmp_path, dtype, kind):
    """Never more, and at least 0.4 of it."""
    engine = load(deep_dir, dtype=dtype)
    memory, shape = engine._workshop.memory, engine._runs["run"].shape
    if kind == "recomputed":
        limit = memory.needed(800, shape, with_gradient=True) - 1
        engine = load(deep_dir, limit, dtype=dtype)
        assert engine._workshop.memory.recomputes(800, shape)
    else:
        assert not memory.recomputes(800, shape)
    act = engine.forward if kind == "forward" else engine.forward_backward
    data = [long_datum(800)]
    act("run", [long_datum(10)], "cross_entropy", {})  # lays out what later passes need, too
    measured = peak_bytes(lambda: act("run", data, "cross_entropy", {}), tmp_path)
    needed = memory.needed(800, shape, with_gradient=kind != "forward", recompute=kind == "recomputed")
    assert 0.4 * needed <= measured <= needed


def test_long_sequences_are_computed_in_less_memory_with_the_same_bits(deep_dir, tmp_path):
    plain = load(deep_dir)
    memory, shape = plain._workshop.memory, plain._runs["run"].shape
    tight = load(deep_dir, memory.needed(100, shape, with_gradient=True))
    data = [long_datum(150, 1), long_datum(60, 2), *(long_datum(20, seed) for seed in range(3, 9))]
    results = [engine.forward_backward("run", data, "cross_entropy", {}) for engine in (plain, tight)]
    assert results[0] == results[1]
    grads = [engine._runs["run"].accumulated.grad_P for engine in (plain, tight)]
    assert torch.equal(*grads)
    peaks = [
        peak_bytes(lambda engine=engine: engine.forward("run", data, "cross_entropy", {}), tmp_path)
        for engine in (plain, tight)
    ]
    assert peaks[0] == peaks[1], "without a backward there is nothing to keep"


def test_a_sequence_that_memory_does_not_hold_is_refused_by_name(deep_dir):
    memory, shape = load(deep_dir)._workshop.memory, load(deep_dir)._runs["run"].shape
    limit = memory.needed(90, shape, with_gradient=True, recompute=True)
    engine = load(deep_dir, limit)
    engine.forward_backward("run", [long_datum(90)] * 3, "cross_entropy", {})
    before = engine._runs["run"].accumulated.grad_P.clone()
    with pytest.raises(BadRequest, match=r"^data\[1\]\.model_input: at most 90 tokens fit .*, got 91$"):
        engine.forward_backward("run", [long_datum(20), long_datum(91)], "cross_entropy", {})
    assert torch.equal(engine._runs["run"].accumulated.grad_P, before)
    engine.forward("run", [long_datum(91)], "cross_entropy", {})
    halves = [
        Datum(d.tokens, {**d.loss_inputs, "ref_logprobs": Tensor.of([-1.0] * 50, "float32")})
        for d in (long_datum(50), long_datum(50, 1))
    ]
    engine.optim_step("run", AdamParams())
    with pytest.raises(BadRequest, match=r"data\[0\].model_input: at most 90 tokens together with .*, got 50 \+ 50"):
        engine.forward_backward("run", halves, "dpo", {})


def test_a_limit_below_one_token_is_said_at_the_start(deep_dir):
    with pytest.raises(OperationFailed, match="may take 1000 bytes, and takes at least"):
        load(deep_dir, 1000)


def test_many_short_sequences_are_split_by_what_fits(deep_dir):
    memory, shape = load(deep_dir)._workshop.memory, load(deep_dir)._runs["run"].shape
    engine = load(deep_dir, memory.needed(30, shape, with_gradient=True, recompute=True), budget=512)
    data = [long_datum(25, seed) for seed in range(5)]
    request = engine.begin("run", ForwardBackward(data, "cross_entropy", {}))
    assert request.job.num_next_tokens == 25
    engine.forward_backward("run", data, "cross_entropy", {})


def test_the_budget_follows_from_the_memory(deep_dir):
    assert Engine.load(deep_dir, device="cpu", dtype="float32").train_token_budget == 512
    small = Engine.load(deep_dir, device="cpu", dtype="float32", limits=EngineLimits(activation_bytes=6 * 2**20))
    memory, usual = small._workshop.memory, AdapterShape(small._decoder.config, 32)
    assert 64 <= small.train_token_budget < 512
    assert not memory.recomputes(small.train_token_budget, usual)
    assert memory.recomputes(small.train_token_budget + 1, usual)


def test_the_memory_of_a_process_is_that_of_its_groups(tmp_path, monkeypatch):
    machine = device.total_memory(torch.device("cpu"))
    groups = tmp_path / "sys"
    (groups / "outer" / "inner").mkdir(parents=True)
    (groups / "outer" / "memory.max").write_text("3000000\n")
    (groups / "outer" / "inner" / "memory.max").write_text("max\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    monkeypatch.setattr(device, "_CGROUPS", groups)
    monkeypatch.setattr(device, "_OWN_CGROUP", own)
    assert device.total_memory(torch.device("cpu")) == 3000000
    (groups / "memory" / "a").mkdir(parents=True)
    (groups / "memory" / "a" / "memory.limit_in_bytes").write_text("2000000\n")
    own.write_text("5:memory:/a\n4:cpu:/a\n")
    assert device.total_memory(torch.device("cpu")) == 2000000
    own.write_text("0::/elsewhere\n")
    assert machine <= device.total_memory(torch.device("cpu"))

"""Activations: recomputed layer by layer where they would not fit."""

from typing import NamedTuple

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import tiny_models
from memory_peaks import peak_bytes
from selfloop.engine.backends import device, select
from selfloop.engine.backends.base import Varlen
from selfloop.engine.backends.cpu_native.backend import NativeBackend
from selfloop.engine.backends.cpu_native.build import kernels
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.engine import Engine
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.types.datum import Datum, Tensor
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams, Forward, ForwardBackward
from selfloop.types.result import LossResult
from selfloop.types.settings import EngineLimits


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
    model = Engine.load(deep_dir, device="cpu", dtype=dtype)._model
    shape = AdapterShape(model.spec, 4)
    theta_P = torch.randn(shape.num_parameters, generator=torch.Generator().manual_seed(1)) * 0.1
    lengths = [9, 17]

    def outcome(recompute):
        leaf_P = theta_P.to(model.dtype, copy=True).requires_grad_()
        batch = Varlen.whole(torch.tensor(tiny_models.random_ids(sum(lengths), 0)), lengths)
        lora = AdapterBatch.of([(sum(lengths), shape.adapter(leaf_P, 8.0))])
        h_TD = model.forward(batch, lora, recompute=recompute)
        (grad_P,) = torch.autograd.grad(h_TD.float().square().sum(), leaf_P)
        return h_TD, grad_P

    for plain, recomputed in zip(outcome(False), outcome(True), strict=True):
        assert torch.equal(plain, recomputed)
        assert plain.abs().sum() > 0


def long_datum(num, seed=0):
    return tiny_models.next_token_datum(tiny_models.random_ids(num + 1, seed))


def load(folder, activation_bytes=None, *, dtype="float32", budget=64):
    limits = EngineLimits(train_token_budget=budget, activation_bytes=activation_bytes, forward_cache_bytes=0)
    engine = Engine.load(folder, device="cpu", dtype=dtype, limits=limits)
    engine.init_run("run", rank=4, seed=0)
    theta_P = engine._runs["run"].theta_P
    theta_P.add_(torch.randn(theta_P.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return engine


@pytest.mark.parametrize("kind", ["forward", "kept", "recomputed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_takes_what_is_estimated(deep_dir, dtype, kind):
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
    measured = peak_bytes(lambda: act("run", data, "cross_entropy", {}))
    needed = memory.needed(800, shape, with_gradient=kind != "forward", recompute=kind == "recomputed")
    assert 0.4 * needed <= measured <= needed


class Shape(NamedTuple):
    """A model, and what is computed on it: ``lengths`` of each of ``num_runs`` runs."""

    model: dict[str, int]
    rank: int
    lengths: list[int]
    num_runs: int = 1
    unembed: bool = False
    deterministic: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    recurrent: bool = False
    sinks: bool = False

    def build(self) -> PreTrainedModel:
        sizes = {"vocab_size": 96, "max_position_embeddings": 2048, "eos_token_id": 2, **self.model}
        torch.manual_seed(0)
        if self.num_experts:
            experts = {"num_experts": self.num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=16, **experts, **sizes))
        if self.sinks:
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}
            return GptOssForCausalLM(GptOssConfig(head_dim=16, pad_token_id=0, **experts, **sizes))
        if self.recurrent:
            heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
            dims = {"linear_key_head_dim": 8, "linear_value_head_dim": 12, "head_dim": 16}
            return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **heads, **dims))
        if self.qk_norm:
            return Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes))
        return LlamaForCausalLM(LlamaConfig(**sizes))


_NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
_WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4}
_SHALLOW = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
SHAPES = [
    Shape({**_NARROW, "num_hidden_layers": 8}, 1, [1200]),
    Shape({**_NARROW, "num_hidden_layers": 3}, 40, [3, 700, 90]),
    Shape({**_WIDE, "num_hidden_layers": 6}, 16, [100] * 8),
    Shape({**_WIDE, "num_hidden_layers": 2}, 4, [150, 250], num_runs=3, deterministic=True),
    Shape({**_WIDE, "num_hidden_layers": 2}, 64, [30], num_runs=4),
    Shape({**_SHALLOW, "num_hidden_layers": 12, "vocab_size": 2000}, 8, [500, 300]),
    Shape({**_NARROW, "num_hidden_layers": 4, "vocab_size": 1000}, 33, [64, 400], unembed=True),
    Shape({**_NARROW, "num_hidden_layers": 4}, 8, [300, 301], num_runs=2, deterministic=True, qk_norm=True),
    Shape({**_NARROW, "num_hidden_layers": 3}, 8, [700, 90], num_runs=2, num_experts=5),
    Shape({**_NARROW, "num_hidden_layers": 3}, 24, [90] * 4, num_runs=2, deterministic=True, num_experts=3),
    Shape({**_NARROW, "num_hidden_layers": 4}, 8, [1500, 300], sinks=True),
    # As many chunks at once as there may be, of more sequences than that, and in the end states for every chunk.
    Shape({**_NARROW, "num_hidden_layers": 4}, 8, [40] * 10 + [130] * 9, recurrent=True),
    Shape({**_NARROW, "num_hidden_layers": 4}, 8, [90] * 10, num_runs=2, deterministic=True, recurrent=True),
]
# All that this machine has: what other machines compute by is computed here, too.
LAYOUTS = ["plain"]
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    LAYOUTS.append("blocked")
if kernels() is not None:
    LAYOUTS.append("panels")


@pytest.mark.parametrize("layout", ["float32", *LAYOUTS])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_no_pass_takes_more_than_is_estimated(number, layout, tmp_path, monkeypatch):
    shape, dtype = SHAPES[number], "float32" if layout == "float32" else "bfloat16"
    backend = NativeBackend() if layout == "panels" else TorchBackend("plain" if layout == "float32" else layout)
    monkeypatch.setattr(select, "BACKENDS", (backend,))
    folder, num_tokens = tmp_path / "model", sum(shape.lengths) * shape.num_runs
    tiny_models.save_quietly(shape.build(), folder)
    if layout == "panels" and (shape.num_experts or shape.recurrent or shape.sinks):
        pytest.skip("the CPU kernels have neither experts nor states")
    targets = LoraTargets(unembed=shape.unembed, experts=shape.num_experts > 0)

    def loaded(limit):
        limits = EngineLimits(train_token_budget=2048, activation_bytes=limit, forward_cache_bytes=0)
        engine = Engine.load(folder, device="cpu", dtype=dtype, limits=limits, deterministic=shape.deterministic)
        for run in range(shape.num_runs):
            engine.init_run(f"run{run}", rank=shape.rank, seed=0, targets=targets)
        return engine

    def check(engine, operation, *, recompute):
        def asked(lengths):
            data = [long_datum(length, seed) for seed, length in enumerate(lengths)]
            return [(f"run{run}", operation(data, "cross_entropy", {})) for run in range(shape.num_runs)]

        engine.compute(asked([4]))  # lays out what later passes need, too
        results = []
        measured = peak_bytes(lambda: results.extend(engine.compute(asked(shape.lengths))))
        assert all(isinstance(result, LossResult) for result in results)
        with_gradient = operation is ForwardBackward
        needed = memory.needed(
            num_tokens, adapter, with_gradient=with_gradient, recompute=recompute, num_runs=shape.num_runs
        )
        print(f"{shape} {layout} {operation.__name__} {recompute=}: {measured / needed:.2f}")
        assert 0.2 * needed <= measured <= needed

    engine = loaded(None)
    memory, adapter = engine._workshop.memory, engine._runs["run0"].shape
    assert not memory.recomputes(num_tokens, adapter, shape.num_runs)
    check(engine, Forward, recompute=False)
    check(engine, ForwardBackward, recompute=False)
    engine = loaded(memory.needed(num_tokens, adapter, with_gradient=True, num_runs=shape.num_runs) - 1)
    assert engine._workshop.memory.recomputes(num_tokens, adapter, shape.num_runs)
    assert engine._workshop.memory.longest(adapter, with_gradient=True) >= num_tokens
    check(engine, ForwardBackward, recompute=True)


def test_long_sequences_are_computed_in_less_memory_with_the_same_bits(deep_dir):
    plain = load(deep_dir)
    memory, shape = plain._workshop.memory, plain._runs["run"].shape
    tight = load(deep_dir, memory.needed(100, shape, with_gradient=True))
    data = [long_datum(150, 1), long_datum(60, 2), *(long_datum(20, seed) for seed in range(3, 9))]
    results = [engine.forward_backward("run", data, "cross_entropy", {}) for engine in (plain, tight)]
    assert results[0] == results[1]
    grads = [engine._runs["run"].accumulated.grad_P for engine in (plain, tight)]
    assert torch.equal(*grads)
    peaks = [
        peak_bytes(lambda engine=engine: engine.forward("run", data, "cross_entropy", {})) for engine in (plain, tight)
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
    memory, usual = small._workshop.memory, AdapterShape(small._model.spec, 32)
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

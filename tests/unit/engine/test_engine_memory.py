"""Activations: recomputed layer by layer where they would not fit."""

import pytest
import torch

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.attention import PackedCausalAttention
from selfloop.engine.models.decoder import positions_of


@pytest.fixture(scope="module")
def qwen3_dir(tmp_path_factory):
    return tiny_models.save("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_layers_give_the_same_bits(qwen3_dir, dtype):
    decoder = Engine.load(qwen3_dir, device="cpu", dtype=dtype)._decoder
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

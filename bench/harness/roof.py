"""The machine's limits, measured, and what a model asks of it.

A token that goes forward costs a multiplication and an addition for each weight of the linear layers; backward through
frozen weights costs as much again. Attention, norms and the adapters are not counted, so that a fraction of the roof
that these figures give is a lower bound.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.measure import now

# Far beyond any cache.
_READ_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What the linear layers of a model have.

    Args:
        block_weights: weights of all blocks.
        head_weights: weights of the projection to the vocabulary.
        adapter_ends: inputs and outputs of the blocks' layers: what an adapter has for each of its ranks.
    """

    block_weights: int
    head_weights: int
    adapter_ends: int

    @classmethod
    def read(cls, model_dir: Path) -> "ModelCost":
        return cls.of(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))

    @classmethod
    def of(cls, config: dict[str, Any]) -> "ModelCost":
        """From a Hugging Face ``config.json`` of a Llama-like decoder."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        num_layers, mlp_size = int(config["num_hidden_layers"]), int(config["intermediate_size"])
        q_size, kv_size = heads * head_dim, kv_heads * head_dim
        # Of each linear layer of a block, what goes in and what comes out.
        ends = [(hidden, q_size), (hidden, kv_size), (hidden, kv_size), (q_size, hidden)]
        ends += [(hidden, mlp_size), (hidden, mlp_size), (mlp_size, hidden)]
        return cls(
            num_layers * sum(a * b for a, b in ends),
            hidden * int(config["vocab_size"]),
            num_layers * sum(a + b for a, b in ends),
        )

    def adapter_weights(self, rank: int) -> int:
        """Weights of a LoRA adapter on every linear layer of the blocks."""
        return rank * self.adapter_ends

    def forward_gflop(self, head_share: float = 1.0) -> float:
        """GFLOP of one token, of which only ``head_share`` need logits."""
        return 2 * (self.block_weights + head_share * self.head_weights) / 1e9

    def train_gflop(self, head_share: float = 1.0) -> float:
        """GFLOP of one token forward and backward with frozen weights."""
        return 2 * self.forward_gflop(head_share)

    def step_gb(self, dtype: torch.dtype) -> float:
        """GB that one decode step reads, whatever its batch: every weight once."""
        return (self.block_weights + self.head_weights) * dtype.itemsize / 1e9


class Roof:
    """Measures what the machine can do just now, for about ``seconds`` a call."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seconds: float = 0.4) -> None:
        self._seconds = seconds
        generator = torch.Generator().manual_seed(0)
        rows, inner, columns = 4096, 1024, 4096
        self._gflop = 2 * rows * inner * columns / 1e9
        self._a = torch.randn(rows, inner, generator=generator).to(device, dtype)
        self._b = torch.randn(inner, columns, generator=generator).to(device, dtype)
        self._read = torch.ones(_READ_BYTES // 4, device=device)
        self._device = device

    def gflops(self) -> float:
        """GFLOP/s of a large matrix product."""
        return self._gflop * self._per_second(lambda: self._a @ self._b)

    def gb_per_s(self) -> float:
        """GB/s of reading memory."""
        return _READ_BYTES / 1e9 * self._per_second(lambda: torch.dot(self._read, self._read))

    def _per_second(self, call: Callable[[], object]) -> float:
        call()
        self._wait()
        num, started, passed = 0, now(), 0.0
        while passed < self._seconds:
            call()
            self._wait()
            num += 1
            passed = now() - started
        return num / passed

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

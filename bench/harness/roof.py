"""The machine's limits, measured, and what a model asks of it.

A token that goes forward costs a multiplication and an addition for each weight of the linear layers; backward through
frozen weights costs as much again. Attention, norms and the adapters are left out, so that a fraction of the roof
that these figures give is a lower bound.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Far beyond any cache.
_READ_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Weights of the linear layers, in elements: of all blocks, and of the projection to the vocabulary."""

    block_weights: int
    head_weights: int

    @classmethod
    def read(cls, model_dir: Path) -> "ModelCost":
        return cls.of(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))

    @classmethod
    def of(cls, config: dict[str, Any]) -> "ModelCost":
        """From a Hugging Face ``config.json`` of a Llama-like decoder."""
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        mlp = 3 * hidden * int(config["intermediate_size"])
        return cls(int(config["num_hidden_layers"]) * (attention + mlp), hidden * int(config["vocab_size"]))

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
        num, started, passed = 0, time.perf_counter(), 0.0
        while passed < self._seconds:
            call()
            self._wait()
            num += 1
            passed = time.perf_counter() - started
        return num / passed

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

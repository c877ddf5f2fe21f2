"""The projections that carry an adapter, grouped as the decoder fuses them."""

from dataclasses import dataclass

from selfloop.engine.models.config import ModelConfig
from selfloop.types.lora import LoraTargets

HEAD = "lm_head"
"""Name of the output layer, which belongs to no layer of the decoder."""

QKV, OUT, GATE_UP, DOWN = range(4)
"""Index of each group in :func:`linear_groups`, in the base weights of a layer and in an adapter's layer."""


@dataclass(frozen=True, slots=True)
class Target:
    """One projection: its module path inside a layer and its output size."""

    module: str
    out_features: int

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Projections that read the same input, held as one matrix."""

    in_features: int
    targets: tuple[Target, ...]
    bias: bool


def adapted_groups(config: ModelConfig, targets: LoraTargets) -> tuple[LinearGroup | None, ...]:
    """The groups of one layer, None where ``targets`` leaves one as it is."""
    adapted = (targets.attn, targets.attn, targets.mlp, targets.mlp)
    return tuple(group if on else None for group, on in zip(linear_groups(config), adapted, strict=True))


def head_group(config: ModelConfig) -> LinearGroup:
    """The output layer."""
    return LinearGroup(config.hidden_size, (Target(HEAD, config.vocab_size),), bias=False)


def linear_groups(config: ModelConfig) -> tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]:
    """The groups of one layer; every layer is alike."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = (
        Target("self_attn.q_proj", heads),
        Target("self_attn.k_proj", kv_heads),
        Target("self_attn.v_proj", kv_heads),
    )
    return (
        LinearGroup(hidden, qkv, config.qkv_bias),
        LinearGroup(heads, (Target("self_attn.o_proj", hidden),), config.o_bias),
        LinearGroup(hidden, (Target("mlp.gate_proj", inner), Target("mlp.up_proj", inner)), config.mlp_bias),
        LinearGroup(inner, (Target("mlp.down_proj", hidden),), config.mlp_bias),
    )

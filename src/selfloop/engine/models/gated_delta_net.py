"""A mixer with a state of one size in place of keys and values: a linear attention that forgets and corrects itself."""

from dataclasses import dataclass
from typing import ClassVar

from selfloop.engine.models.spec import CacheSpec, Projection, ProjectionGroup, Shapes


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """The gated delta rule behind a short causal convolution; Yang et al. 2024, https://arxiv.org/abs/2412.06464.

    Of every head, with q and k of length 1, a decay exp(g) and a rate b of each token:
    S_t = exp(g_t) S_{t-1} + k_t (b_t (v_t - exp(g_t) S_{t-1}^T k_t))^T and o_t = S_t^T q_t / sqrt(key_dim). Each of
    the ``num_key_heads`` serves as many value heads, which stand together.

    Args:
        kernel: tokens that the convolution sees, itself the last.
        eps: of the RMSNorm of every head of o, which silu(z) gates.
        packed: whether the checkpoint has q, k, v and z in one matrix and b and a in another, each with what belongs to
            one key head together; an adapter is then on those.
    """

    hidden_size: int
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    eps: float
    packed: bool = False

    kind: ClassVar[str] = "gated_delta_net"

    @property
    def keys_size(self) -> int:
        """Of q or k of a token, all heads."""
        return self.num_key_heads * self.key_dim

    @property
    def values_size(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def mixed_size(self) -> int:
        """Channels of the convolution: q, k and v."""
        return 2 * self.keys_size + self.values_size

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        sizes = {
            "in_proj_qkv": self.mixed_size,
            "in_proj_z": self.values_size,
            "in_proj_b": self.num_value_heads,
            "in_proj_a": self.num_value_heads,
        }
        if self.packed:
            both = 2 * self.num_value_heads
            sizes = {"in_proj_qkvz": self.mixed_size + self.values_size, "in_proj_ba": both}
        into = tuple(Projection(f"linear_attn.{name}", self.hidden_size, size, "out") for name, size in sizes.items())
        out = Projection("linear_attn.out_proj", self.values_size, self.hidden_size, "in")
        return ProjectionGroup(into), ProjectionGroup((out,))

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(projection for group in self.groups for projection in group.projections)

    @property
    def num_active_weights(self) -> int:
        return sum(projection.in_features * projection.out_features for projection in self.projections)

    def tensors(self) -> Shapes:
        shapes = {name: shape for projection in self.projections for name, shape in projection.tensors().items()}
        return shapes | {
            "linear_attn.conv1d.weight": (self.mixed_size, 1, self.kernel),
            "linear_attn.dt_bias": (self.num_value_heads,),
            "linear_attn.A_log": (self.num_value_heads,),
            "linear_attn.norm.weight": (self.value_dim,),
        }

    @property
    def cache(self) -> CacheSpec:
        """The state, and the last tokens that the convolution sees again."""
        state = self.num_value_heads * self.key_dim * self.value_dim
        return CacheSpec("state", state + (self.kernel - 1) * self.mixed_size)

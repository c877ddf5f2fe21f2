"""A feed-forward of many small MLPs, of which a router gives each token a few."""

from dataclasses import dataclass
from typing import ClassVar

from selfloop.engine.models.spec import Projection, ProjectionGroup, Shapes


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """sum over the ``top_k`` likeliest experts e of p_e * down_e(silu(gate_e(x)) * up_e(x)), p = softmax(router(x)).

    Every expert takes an adapter of its own, the router none.

    To that is added what a shared expert, which every token goes through, gives: s(x) * down(silu(gate(x)) * up(x)),
    s = sigmoid of one row's product with x (Qwen2-MoE).

    Args:
        normalised: whether the chosen experts' p are divided by their sum.
        shared_size: inner size of the shared expert; None where there is none.
    """

    hidden_size: int
    inner_size: int
    num_experts: int
    top_k: int
    normalised: bool
    shared_size: int | None = None

    kind: ClassVar[str] = "mixture_of_experts"

    @property
    def router(self) -> Projection:
        return Projection("mlp.gate", self.hidden_size, self.num_experts, "out", adaptable=False)

    def expert(self, index: int) -> tuple[Projection, Projection, Projection]:
        """Its gate, up and down projections."""
        name, hidden, inner = f"mlp.experts.{index}", self.hidden_size, self.inner_size
        return (
            Projection(f"{name}.gate_proj", hidden, inner, "out"),
            Projection(f"{name}.up_proj", hidden, inner, "out"),
            Projection(f"{name}.down_proj", inner, hidden, "in"),
        )

    @property
    def shared_gate(self) -> Projection | None:
        if self.shared_size is None:
            return None
        return Projection("mlp.shared_expert_gate", self.hidden_size, 1, "out", adaptable=False)

    @property
    def _shared_groups(self) -> tuple[ProjectionGroup, ...]:
        if self.shared_size is None:
            return ()
        name, hidden, inner = "mlp.shared_expert", self.hidden_size, self.shared_size
        gate_up = [Projection(f"{name}.{part}_proj", hidden, inner, "out") for part in ("gate", "up")]
        down = Projection(f"{name}.down_proj", inner, hidden, "in")
        return ProjectionGroup(tuple(gate_up)), ProjectionGroup((down,))

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        experts = [self.expert(index) for index in range(self.num_experts)]
        gate_up = tuple(projection for gate, up, _ in experts for projection in (gate, up))
        down = tuple(down for _, _, down in experts)
        routed = ProjectionGroup(gate_up, self.num_experts), ProjectionGroup(down, self.num_experts)
        return (*routed, *self._shared_groups)

    @property
    def projections(self) -> tuple[Projection, ...]:
        experts = [projection for index in range(self.num_experts) for projection in self.expert(index)]
        gate = [] if self.shared_gate is None else [self.shared_gate]
        shared = [projection for group in self._shared_groups for projection in group.projections]
        return (self.router, *experts, *gate, *shared)

    @property
    def num_active_weights(self) -> int:
        """Elements of the matrices that a token is multiplied by."""
        shared = 0 if self.shared_size is None else 1 + 3 * self.shared_size
        return self.hidden_size * (self.num_experts + 3 * self.top_k * self.inner_size + shared)

    def tensors(self) -> Shapes:
        return {name: shape for projection in self.projections for name, shape in projection.tensors().items()}

    @property
    def cache(self) -> None:
        return None

"""A feed-forward of many small MLPs, of which a router gives each token a few."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from selfloop.engine.models.spec import Projection, ProjectionGroup, Shapes
from selfloop.types.errors import model_invalid

Scoring = Literal["softmax", "sigmoid", "softmax_of_chosen"]
"""What weighs the experts: softmax or sigmoid over the logits of all, or softmax over those that are chosen."""


@dataclass(frozen=True, slots=True)
class Router:
    """Gives each token ``top_k`` of ``num_experts`` experts, and each of these a weight.

    The experts with the largest scores are chosen. With ``groups`` they are those of the best groups: experts lie in
    as many groups one after another, of which those count whose two best scores have the largest sums
    (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.1.2).

    Args:
        normalised: whether the weights of the chosen experts are divided by their sum.
        scale: what weights are multiplied by after that.
        correction: name of a tensor (num_experts,) that is added to the scores when experts are chosen, and not to
            their weights; None where there is none.
        groups: how many there are, and how many of them a token's experts are of.
        in_float32: whether logits are computed so whatever the compute dtype.
        bias: whether logits have one.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    scoring: Scoring = "softmax"
    normalised: bool = False
    scale: float = 1.0
    correction: str | None = None
    groups: tuple[int, int] = (1, 1)
    in_float32: bool = False
    bias: bool = False
    name: str = "mlp.gate"

    def __post_init__(self) -> None:
        num, best = self.groups
        if self.num_experts % num or best > num or (best < num and self.num_experts < 2 * num):
            raise model_invalid(
                f"n_group {num} and topk_group {best} do not fit {self.num_experts} experts: groups of at least two "
                "are alike, and no more are chosen than there are"
            )
        if self.top_k > self.num_experts // num * best:
            raise model_invalid(f"num_experts_per_tok {self.top_k} is more than the experts that may be chosen")

    @property
    def projection(self) -> Projection:
        return Projection(self.name, self.hidden_size, self.num_experts, "out", self.bias, adaptable=False)

    def tensors(self) -> Shapes:
        correction: Shapes = {} if self.correction is None else {self.correction: (self.num_experts,)}
        return self.projection.tensors() | correction


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """What every token goes through: down(silu(gate(x)) * up(x)), times sigmoid(w x) where it has such a gate.

    Args:
        gate: name of the module of w, one row; None where nothing weighs it.
    """

    hidden_size: int
    inner_size: int
    name: str = "mlp.shared_expert"
    gate: str | None = "mlp.shared_expert_gate"

    @property
    def gate_projection(self) -> Projection | None:
        return None if self.gate is None else Projection(self.gate, self.hidden_size, 1, "out", adaptable=False)

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        hidden, inner = self.hidden_size, self.inner_size
        gate_up = [Projection(f"{self.name}.{part}_proj", hidden, inner, "out") for part in ("gate", "up")]
        down = Projection(f"{self.name}.down_proj", inner, hidden, "in")
        return ProjectionGroup(tuple(gate_up)), ProjectionGroup((down,))


class ExpertNames(NamedTuple):
    """``folder`` is their path inside the layer, the others the projections of each."""

    folder: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


_NAMES = ExpertNames()


@dataclass(frozen=True, slots=True)
class Clamp:
    """(up + 1) * gate * sigmoid(alpha * gate), gate at most ``limit`` and up within it; gpt-oss."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """sum over a token's experts e of w_e * down_e(silu(gate_e(x)) * up_e(x)), plus the shared expert's.

    Every expert takes an adapter of its own, the router none.

    Args:
        clamp: of another gate; None is silu.
        stacks: whether the checkpoint has one tensor for all experts of a layer: ``gate_up_proj`` (E, D, 2F), where
            columns of gate and up take turns, ``down_proj`` (E, F, D), and their biases ``*_bias``. Such experts take
            no adapters.
    """

    inner_size: int
    router: Router
    shared: SharedExpert | None = None
    names: ExpertNames = _NAMES
    clamp: Clamp | None = None
    stacks: bool = False

    kind: ClassVar[str] = "mixture_of_experts"

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    def expert(self, index: int) -> tuple[Projection, Projection, Projection]:
        """Its gate, up and down projections."""
        folder, gate, up, down = self.names
        hidden, inner = self.router.hidden_size, self.inner_size
        return (
            Projection(f"{folder}.{index}.{gate}", hidden, inner, "out", self.stacks, not self.stacks),
            Projection(f"{folder}.{index}.{up}", hidden, inner, "out", self.stacks, not self.stacks),
            Projection(f"{folder}.{index}.{down}", inner, hidden, "in", self.stacks, not self.stacks),
        )

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        if self.stacks:
            return ()
        experts = [self.expert(index) for index in range(self.num_experts)]
        gate_up = tuple(projection for gate, up, _ in experts for projection in (gate, up))
        down = tuple(down for _, _, down in experts)
        routed = ProjectionGroup(gate_up, self.num_experts), ProjectionGroup(down, self.num_experts)
        return (*routed, *(() if self.shared is None else self.shared.groups))

    @property
    def projections(self) -> tuple[Projection, ...]:
        experts = [projection for index in range(self.num_experts) for projection in self.expert(index)]
        shared: list[Projection] = []
        if self.shared is not None:
            gate = self.shared.gate_projection
            shared = [] if gate is None else [gate]
            shared += [projection for group in self.shared.groups for projection in group.projections]
        return (self.router.projection, *experts, *shared)

    @property
    def num_active_weights(self) -> int:
        """Elements of the matrices that a token is multiplied by."""
        per_row = self.num_experts + 3 * self.router.top_k * self.inner_size
        if self.shared is not None:
            per_row += 3 * self.shared.inner_size + (0 if self.shared.gate is None else 1)
        return self.router.hidden_size * per_row

    def tensors(self) -> Shapes:
        if self.stacks:
            return self.router.tensors() | self._stacked()
        projections = {name: shape for projection in self.projections for name, shape in projection.tensors().items()}
        return self.router.tensors() | projections

    def _stacked(self) -> Shapes:
        num, hidden, inner, folder = self.num_experts, self.router.hidden_size, self.inner_size, self.names.folder
        return {
            f"{folder}.gate_up_proj": (num, hidden, 2 * inner),
            f"{folder}.gate_up_proj_bias": (num, 2 * inner),
            f"{folder}.down_proj": (num, inner, hidden),
            f"{folder}.down_proj_bias": (num, hidden),
        }

    @property
    def cache(self) -> None:
        return None

"""How a loss declares what it takes: the gateway validates from it, the engine computes by it."""

from collections.abc import Collection
from dataclasses import dataclass, field

from selfloop.types.errors import BadRequest


@dataclass(frozen=True, slots=True)
class LossSpec:
    """Inputs and configuration of one loss.

    Args:
        required: per-token float inputs (N,) that must come with every datum, besides ``target_tokens``.
        one_of: names of one further input that must come with every datum, under exactly one of them.
        optional: per-token float inputs (N,) that may come.
        defaults_to: the input that replaces an optional one in every datum that lacks it.
        config: configuration fields with their defaults; a bool default makes a flag. Numbers are >= 0.
        at_most: upper bounds of configuration numbers.
        ordered: pairs of configuration fields of which the first may not exceed the second.
        rows: consecutive datums that make one unit: 1, or 2 for a loss of pairs. A unit is never divided.
        many_targets: True when targets may be (N, K), with the optional inputs of the same shape.
    """

    name: str
    required: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    defaults_to: dict[str, str] = field(default_factory=dict[str, str])
    config: dict[str, float | bool] = field(default_factory=dict[str, "float | bool"])
    at_most: dict[str, float] = field(default_factory=dict[str, float])
    ordered: tuple[tuple[str, str], ...] = ()
    rows: int = 1
    many_targets: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every input that a datum may carry."""
        return ("target_tokens", *self.required, *self.one_of, *self.optional)


def one_of(given: Collection[str], spec: LossSpec, field: str) -> str:
    """The name under which ``spec.one_of`` came; raises BadRequest below ``field`` for none and for several."""
    found = [name for name in spec.one_of if name in given]
    if len(found) != 1:
        wrong = found[1] if found else spec.one_of[0]
        raise BadRequest(f"{field}.{wrong}", f"{spec.name} takes exactly one of {', '.join(spec.one_of)}")
    return found[0]

"""Which worker group of a base model capacity lives in: the one with the fewest, for as long as that group is well."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupView:
    """A worker group as placement sees it.

    Args:
        num_placed: runs and samplers that live in it, less the one that is to be placed.
        is_ready: its base model is in memory.
        is_down: its worker died or cannot start, and nobody has started it again.
        is_drained: it takes nothing new.
    """

    name: str
    num_placed: int
    is_ready: bool = False
    is_down: bool = False
    is_drained: bool = False


def choose(groups: Sequence[GroupView], current: str | None) -> str:
    """The group for what lives in ``current``, None if it lives in none.

    It stays while its group is up and not drained. Else it goes to the group with the fewest, of those that are as
    many a loaded one first, then in their own order. Groups that are down are taken only where no other is left.

    Args:
        groups: of one base model; at least one of them is not drained.
    """
    takes = [group for group in groups if not group.is_drained]
    takes = [group for group in takes if not group.is_down] or takes
    if any(group.name == current for group in takes):
        assert current is not None
        return current
    return min(takes, key=lambda group: (group.num_placed, not group.is_ready)).name

"""The worker groups of each base model, and which of them what capacity lives in."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from selfloop.control.capacity.group_choice import GroupView, choose
from selfloop.control.capacity.transitions import ENDED, SLEEPING, Kind
from selfloop.control.capacity.workers import WorkerPool, WorkerSlot, WorkerState
from selfloop.types.errors import BadRequest, Conflict


@dataclass(slots=True)
class Member:
    kind: Kind
    id: str
    status: str
    reason: str = ""
    has_served: bool = False
    num_uses: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class CapacityGroup:
    """Capacity that lives and sleeps together: a trainer deployment with its paired samplers, or one sampler.

    ``slot`` is the worker group that it lives in while it is awake; ``leaving`` the one that it is moved from.
    """

    key: str
    model_name: str
    delay_s: float
    last_used: float
    num_uses: int = 0
    slot: WorkerSlot | None = None
    leaving: WorkerSlot | None = None
    members: dict[str, Member] = field(default_factory=dict[str, Member])

    @property
    def is_awake(self) -> bool:
        return any(m.status not in SLEEPING and m.status not in ENDED for m in self.members.values())


@dataclass(frozen=True, slots=True)
class PlacedGroup:
    """A worker group and what lives in it: trainer deployments and samplers, by their ids."""

    name: str
    model_name: str
    state: WorkerState
    reason: str
    is_drained: bool
    pid: int | None
    deployments: tuple[str, ...]
    samplers: tuple[str, ...]


class WorkerGroups:
    """Chooses among the worker groups of a base model, and knows which are drained, until the server is restarted.

    Args:
        capacity: all that there is, by its key.
    """

    def __init__(self, pool: WorkerPool, capacity: Mapping[str, CapacityGroup]) -> None:
        self._pool = pool
        self._capacity = capacity
        self._drained: set[str] = set()

    def chosen(self, group: CapacityGroup) -> WorkerSlot:
        """The worker group for capacity: the one that it lives in while that is well."""
        slots = self._pool.slots_of(group.model_name)
        if len(slots) == 1:
            return slots[0]
        return self._of(slots, choose(self._views(slots, group), group.slot.name if group.slot else None))

    def other(self, group: CapacityGroup, name: str | None) -> WorkerSlot:
        """A worker group to move capacity to: the one of that ``name``, else the one with the fewest.

        Raises:
            BadRequest: there is no such group, or it is of another base model.
            Conflict: that group, or every other one, is drained.
        """
        if name is None:
            slots = [slot for slot in self._pool.slots_of(group.model_name) if slot is not group.slot]
            if all(slot.name in self._drained for slot in slots):
                raise Conflict(f"no other worker group of {group.model_name} takes runs (--workers)")
            return self._of(slots, choose(self._views(slots, group), None))
        slot = self.named(name)
        if slot.model_name != group.model_name:
            raise BadRequest("group", f"one of {group.model_name}, got {name}, which is of {slot.model_name}")
        if name in self._drained:
            raise Conflict(f"{name} is drained and takes nothing new")
        return slot

    def drain(self, name: str) -> list[CapacityGroup]:
        """Have a worker group take nothing new; what lives in it is to be moved.

        Raises:
            BadRequest: there is no such group.
            Conflict: no other group of its base model takes anything.
        """
        slot = self.named(name)
        if not {other.name for other in self._pool.slots_of(slot.model_name)} - self._drained - {name}:
            raise Conflict(f"{name} is the only worker group of {slot.model_name} that takes runs (--workers)")
        self._drained.add(name)
        return self._living_in(slot)

    def undrain(self, name: str) -> PlacedGroup:
        """Have a drained group take what is placed next. Raises :class:`BadRequest`: there is no such group."""
        slot = self.named(name)
        self._drained.discard(name)
        return self.placed_in(slot)

    def all(self) -> list[PlacedGroup]:
        """Those of every base model that was used since the start."""
        return [self.placed_in(slot) for slot in self._pool.slots()]

    def placed_in(self, slot: WorkerSlot) -> PlacedGroup:
        """A worker group with what lives in it now."""
        members = [member for group in self._living_in(slot) for member in group.members.values()]
        deployments = tuple(m.id for m in members if m.kind == "deployment")
        samplers = tuple(m.id for m in members if m.kind == "sampler")
        pid = None if slot.client is None else slot.client.pid
        is_drained = slot.name in self._drained
        return PlacedGroup(slot.name, slot.model_name, slot.state, slot.reason, is_drained, pid, deployments, samplers)

    def named(self, name: str) -> WorkerSlot:
        """Raises :class:`BadRequest`: there is no such group."""
        slots = self._pool.slots()
        for slot in slots:
            if slot.name == name:
                return slot
        known = ", ".join(slot.name for slot in slots) or "none yet, as no base model was used since the start"
        raise BadRequest("group", f"a worker group, of which there are {known}; got {name}")

    def _living_in(self, slot: WorkerSlot) -> list[CapacityGroup]:
        return [group for group in self._capacity.values() if group.slot is slot and group.is_awake]

    def _views(self, slots: list[WorkerSlot], but: CapacityGroup) -> list[GroupView]:
        return [
            GroupView(
                slot.name,
                sum(group is not but for group in self._living_in(slot)),
                slot.state == "ready",
                slot.is_down,
                slot.name in self._drained,
            )
            for slot in slots
        ]

    def _of(self, slots: list[WorkerSlot], name: str) -> WorkerSlot:
        return next(slot for slot in slots if slot.name == name)

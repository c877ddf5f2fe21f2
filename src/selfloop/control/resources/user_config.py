"""What the holder of a key allows for runs and samplers: accelerators, the preferred first."""

from dataclasses import dataclass

from selfloop.control.capacity.hardware import CPU, this_hardware
from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.storage.db import queries_access
from selfloop.types.errors import BadRequest, Conflict

_MAX_ACCELERATORS = 32
_MAX_NAME = 64


@dataclass(frozen=True, slots=True)
class UserConfig:
    """None allows every accelerator."""

    trainer_accelerators: list[str] | None = None
    sampler_accelerators: list[str] | None = None


class UserConfigs:
    """One machine has one kind of accelerator, so a priority list either allows it or refuses new capacity."""

    def __init__(self, context: Context, device: str) -> None:
        self._c = context
        self.accelerator = CPU if device == "cpu" else this_hardware().accelerator

    async def get(self, caller: Caller) -> UserConfig:
        async with self._c.db.read() as session:
            row = await queries_access.user_config(session, caller.key_id)
        return UserConfig() if row is None else UserConfig(row.trainer_accelerators, row.sampler_accelerators)

    async def patch(self, caller: Caller, changes: dict[str, list[str] | None]) -> UserConfig:
        """Set what ``changes`` names (None clears), leave the rest; returns what holds now.

        Args:
            changes: by the fields of :class:`UserConfig`.
        """
        async with self._c.db.write() as session:
            await queries_access.set_user_config(session, caller.key_id, changes)
        return await self.get(caller)

    async def check(self, caller: Caller, *, trainer: bool, sampler: bool) -> None:
        """Raises :class:`Conflict` when the caller's own config excludes this machine."""
        if (excluded := self.excludes(await self.get(caller), trainer=trainer, sampler=sampler)) is not None:
            raise Conflict(excluded, reason="ACCELERATOR_NOT_ALLOWED")

    def excludes(self, config: UserConfig, *, trainer: bool, sampler: bool) -> str | None:
        """Which list leaves this machine's accelerator out, in words; None when none does."""
        lists = (
            ("trainer_accelerator_priority", trainer, config.trainer_accelerators),
            ("sampler_accelerator_priority", sampler, config.sampler_accelerators),
        )
        for field, asked, allowed in lists:
            if asked and allowed is not None and self.accelerator.upper() not in (name.upper() for name in allowed):
                return (
                    f"your {field} is {', '.join(allowed)}; this server has {self.accelerator}. "
                    "Add it to the list, or clear the list: PATCH /v1/loops/user_config"
                )
        return None


def checked_accelerators(field: str, names: list[str] | None) -> list[str] | None:
    """A list of names, or None. Raises :class:`BadRequest` for an empty list or an empty, long or repeated name."""
    if names is None:
        return None
    if not 1 <= len(names) <= _MAX_ACCELERATORS:
        raise BadRequest(field, f"null, or a list of 1 to {_MAX_ACCELERATORS} GPU types")
    if not all(name.strip() and len(name) <= _MAX_NAME for name in names):
        raise BadRequest(field, f"GPU types of 1 to {_MAX_NAME} characters")
    if len({name.upper() for name in names}) < len(names):
        raise BadRequest(field, "each GPU type once")
    return names

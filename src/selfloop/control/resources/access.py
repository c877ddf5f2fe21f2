"""Teams and API keys: who may see and touch what."""

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfloop.storage.db import queries_access, queries_audit
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import KeyRow, TeamRow
from selfloop.types.errors import BadRequest, Denied, NotFound
from selfloop.types.ids import new_id

_PREFIX = "slk-"
_SHOWN_CHARACTERS = 8


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever holds the key that came with a request."""

    team_id: str
    key_id: str
    key_name: str


class Access:
    """Teams and keys of one installation.

    Valid keys are remembered. ``marker`` is a file that every revocation touches, in whichever process it
    happens, so that what is remembered is forgotten before the next request.
    """

    def __init__(self, db: Database, marker: Path) -> None:
        self._db = db
        self._marker = marker
        self._callers: dict[str, Caller] = {}
        self._names: dict[str, str] = {}
        self._marker_seen = 0

    async def authenticate(self, key: str | None) -> Caller:
        """The caller behind a key. Raises :class:`Denied` without a valid one."""
        if not key:
            raise Denied("an API key is required: Authorization: Bearer <key> (or Api-Key <key>)")
        if (changed := self._last_revocation()) != self._marker_seen:
            self._callers.clear()
            self._marker_seen = changed
        # The digest is looked up, never the key, so timing tells nothing about a valid one.
        digest = _digest(key)
        if digest not in self._callers:
            async with self._db.read() as session:
                row = await queries_access.key_by_hash(session, digest)
            if row is None or row.revoked_at is not None:
                raise Denied("this API key is not valid here")
            self._callers[digest] = Caller(row.team_id, row.id, row.name)
            self._names[row.id] = row.name
        return self._callers[digest]

    async def start(self) -> None:
        """Learn the names of the keys that were made before; the others tell theirs when they are first used."""
        self._names |= {row.id: row.name for row in await self.keys()}

    def name_of(self, key_id: str) -> str | None:
        """The name of a key: what is known of the person who holds it."""
        return self._names.get(key_id)

    def _last_revocation(self) -> int:
        try:
            return self._marker.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    async def ensure_default_team(self) -> TeamRow:
        """The team of keys that name none; made in a new data directory."""
        async with self._db.write() as session:
            team = await queries_access.default_team(session)
            if team is None:
                team = TeamRow(id=new_id(), name="default", is_default=True, created_at=time.time())
                session.add(team)
        return team

    async def ensure_first_key(self, given: str | None) -> str | None:
        """Make sure there is a team and a key; returns a key that was made just now, to be shown once."""
        team = await self.ensure_default_team()
        async with self._db.write() as session:
            if given is not None:
                known = await queries_access.key_by_hash(session, _digest(given))
                if known is None:
                    session.add(_key_row(team.id, "environment", given))
                elif known.revoked_at is not None:
                    raise BadRequest("SELFLOOP_API_KEY", "another key: this one was revoked here")
                return None
            if any(row.revoked_at is None for row in await queries_access.keys(session)):
                return None
            key = _new_key()
            session.add(_key_row(team.id, "first", key))
            return key

    async def create_key(self, name: str, team: str | None) -> str:
        """Make a key in a team (made too if it is new); the only time the key is readable."""
        if not name.strip():
            raise BadRequest("name", "a name that tells what the key is for")
        key = _new_key()
        async with self._db.write() as session:
            if team is None:
                row = await queries_access.default_team(session)
                assert row is not None
            else:
                row = await queries_access.team_named(session, team)
                if row is None:
                    row = TeamRow(id=new_id(), name=team, is_default=False, created_at=time.time())
                    session.add(row)
                    await session.flush()
            made = _key_row(row.id, name, key)
            session.add(made)
            queries_audit.record(session, "key.created", row.id, None, key_id=made.id, name=name)
        return key

    async def team(self, name: str | None) -> TeamRow:
        """A team by name; without one the default team, made in a new data directory."""
        if name is None:
            return await self.ensure_default_team()
        async with self._db.read() as session:
            team = await queries_access.team_named(session, name)
        if team is None:
            raise NotFound("team", name, "`selfloop keys list` shows the teams")
        return team

    async def owner_key(self, team: TeamRow) -> KeyRow:
        """The key that owns what the command line makes: the team's first valid one, or else its first.

        A team without any gets one that nobody knows and that is revoked from the start.
        """
        async with self._db.write() as session:
            known = [row for row in await queries_access.keys(session) if row.team_id == team.id]
            valid = [row for row in known if row.revoked_at is None]
            if known:
                return (valid or known)[0]
            key = _key_row(team.id, "command line", _new_key())
            key.revoked_at = key.created_at
            session.add(key)
        return key

    async def keys(self) -> Sequence[KeyRow]:
        async with self._db.read() as session:
            return await queries_access.keys(session)

    async def revoke_key(self, id: str, by: Caller | None = None) -> None:
        """Revoke a key; ``by`` None is the command line. Raises :class:`NotFound`."""
        async with self._db.write() as session:
            if not await queries_access.revoke(session, id, time.time()):
                raise NotFound("key", id, "`selfloop keys list` shows the valid ones")
            row = await queries_access.key(session, id)
            assert row is not None
            queries_audit.record(
                session, "key.revoked", row.team_id, None if by is None else by.key_id, key_id=id, name=row.name
            )
        self._marker.touch()

    async def teams(self) -> Sequence[TeamRow]:
        async with self._db.read() as session:
            return await queries_access.teams(session)

    async def teams_of(self, caller: Caller) -> Sequence[TeamRow]:
        """The teams a caller may name: a key belongs to exactly one."""
        return [team for team in await self.teams() if team.id == caller.team_id]


def _new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(24)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _key_row(team_id: str, name: str, key: str) -> KeyRow:
    shown = key[: min(_SHOWN_CHARACTERS, len(key) // 4)]
    return KeyRow(id=new_id(), team_id=team_id, name=name, sha256=_digest(key), prefix=shown, created_at=time.time())

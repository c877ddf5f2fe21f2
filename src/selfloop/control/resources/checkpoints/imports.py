"""Imports: somebody's PEFT adapter as a trainer checkpoint, to go on from."""

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from selfloop.control.capacity.lifecycle import record_creation
from selfloop.control.capacity.subprocesses import run_subprocess
from selfloop.control.resources.access import Access
from selfloop.control.resources.catalogue import Catalogue, Model
from selfloop.control.resources.new_rows import new_checkpoint, new_deployment, new_run, new_session
from selfloop.control.resources.sessions import SessionDetails
from selfloop.storage.blobs.checkpoints import CheckpointStore
from selfloop.storage.db.database import Database
from selfloop.types.errors import BadRequest, NotFound, OperationFailed
from selfloop.types.ids import RunId, new_id
from selfloop.types.lora import LoraTargets
from selfloop.types.model_folder import check_links
from selfloop.types.resources import Run
from selfloop.types.status import CheckpointTarget, RunStatus
from selfloop.types.uris import CheckpointUri
from selfloop.worker.launchers.conversions import launch_adapters

CHECKPOINT_NAME = "imported"
_CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 2**20


class _AdapterConfig(msgspec.Struct):
    base_model_name_or_path: str | None = None


class _Facts(msgspec.Struct):
    size_bytes: int
    lora_rank: int
    lora_alpha: float
    changes_nothing: bool
    targets: str


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose the checkpoint will be, and in which project of theirs."""

    team_id: str
    key_id: str
    project_id: str | None = None

    def session_details(self) -> str | None:
        """What is kept with the checkpoint's session."""
        if self.project_id is None:
            return None
        return msgspec.json.encode(SessionDetails(project_id=self.project_id)).decode()


@dataclass(frozen=True, slots=True)
class Imported:
    """The checkpoint that an adapter became; with one that ``changes_nothing`` the model is the base model."""

    uri: str
    base_model: str
    lora_rank: int
    lora_alpha: float
    changes_nothing: bool


class Imports:
    def __init__(self, db: Database, store: CheckpointStore, catalogue: Catalogue, access: Access) -> None:
        self._db = db
        self._store = store
        self._catalogue = catalogue
        self._access = access

    async def add(
        self,
        folder: Path,
        *,
        base_model: str | None,
        name: str | None,
        team: str | None,
        on_progress: Callable[[str, float], None],
    ) -> Imported:
        """Check the adapter against its base model and store it under an ended run of its own.

        Raises:
            BadRequest: no PEFT adapter, or its base model is not known here.
            NotFound: no such base model or team.
            OperationFailed: the adapter is more than plain LoRA, broken, or does not fit the base model.
        """
        key = await self._access.owner_key(await self._access.team(team))
        owner = Owner(key.team_id, key.id)
        folder = folder.expanduser().absolute()
        return await self.add_owned(
            folder, owner, base_model=base_model, name=name or folder.name, on_progress=on_progress
        )

    async def add_owned(
        self,
        folder: Path,
        owner: Owner,
        *,
        base_model: str | None,
        name: str,
        on_progress: Callable[[str, float], None],
    ) -> Imported:
        """The same for whoever is known already. Raises what :meth:`add` raises."""
        named = await asyncio.to_thread(_read_base_model, folder)
        model = await self._base_model(base_model, named)
        model_dir = await self._catalogue.prepare(model.name, lambda stage: on_progress(stage, 0.0))
        checkpoint_id = new_id()
        aside = self._store.staging(checkpoint_id)
        try:
            arguments = ["import", str(folder), str(model_dir), str(aside)]
            body = await run_subprocess(await launch_adapters(*arguments), on_progress)
            facts = msgspec.json.decode(body, type=_Facts)
            run = await self._record(checkpoint_id, model, facts, owner, name)
        except OSError as error:
            raise OperationFailed(f"the checkpoint cannot be stored: {error}; import it again") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)
        uri = CheckpointUri(RunId(run.id), CheckpointTarget.TRAINER, CHECKPOINT_NAME)
        return Imported(str(uri), model.name, facts.lora_rank, facts.lora_alpha, facts.changes_nothing)

    async def _base_model(self, asked: str | None, named: str | None) -> Model:
        if asked is not None:
            return await self._catalogue.resolve(asked, "--base-model")
        if named is None:
            raise BadRequest("--base-model", f"the base model's name here, as {_CONFIG_FILE} gives none")
        try:
            return await self._catalogue.resolve(named)
        except NotFound as error:
            hint = "Or name the same model as it is called here with --base-model"
            raise BadRequest(_CONFIG_FILE, f"base_model_name_or_path: {error}. {hint}") from error

    async def _record(self, checkpoint_id: str, model: Model, facts: _Facts, owner: Owner, name: str) -> Run:
        """The folder gets its name and its rows together: a server that starts clears away folders without one."""
        session_row = new_session(owner, details=owner.session_details())
        run_id = new_id()
        deployment = new_deployment(owner, model.name, model.name, holds_run_id=run_id)
        run = new_run(
            owner,
            session_id=session_row.id,
            deployment=deployment,
            id=run_id,
            name=name,
            base_model=model.name,
            lora_rank=facts.lora_rank,
            max_seq_len=model.max_position_embeddings,
            status=RunStatus.INACTIVE,
        )
        checkpoint = new_checkpoint(
            run,
            id=checkpoint_id,
            name=CHECKPOINT_NAME,
            target=CheckpointTarget.TRAINER,
            step=0,
            lora_rank=facts.lora_rank,
            lora_alpha=facts.lora_alpha,
            size_bytes=facts.size_bytes,
            targets=LoraTargets.parse(facts.targets).stored(),
        )
        try:
            await self._store.upload(checkpoint_id)
            async with self._db.write() as session:
                for row in (session_row, deployment, run, checkpoint):
                    session.add(row)
                    await session.flush()
                record_creation(session, "deployment", deployment.id, deployment.status, "made for an imported adapter")
                record_creation(
                    session, "run", run.id, run.status, "imported: it holds a checkpoint and is not trained"
                )
                await self._store.publish(checkpoint_id)
        except BaseException:
            await self._store.delete(checkpoint_id)
            raise
        return run.view()


def _read_base_model(folder: Path) -> str | None:
    file = folder / _CONFIG_FILE
    if folder.is_dir():
        check_links(folder, "FOLDER")
    if not file.is_file():
        raise BadRequest("FOLDER", f"a PEFT adapter; {folder} has no {_CONFIG_FILE}")
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise BadRequest("FOLDER", f"a PEFT adapter; {file} has more than {_MAX_CONFIG_BYTES} bytes")
    try:
        return msgspec.json.decode(file.read_bytes(), type=_AdapterConfig).base_model_name_or_path
    except msgspec.MsgspecError as error:
        raise BadRequest("FOLDER", f"a PEFT adapter; {file} cannot be read: {error}") from error

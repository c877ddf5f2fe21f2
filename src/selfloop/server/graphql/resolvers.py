"""The answers: one method per field of ``Query`` and ``Mutation``, called by its name."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from selfloop.control.capacity.hardware import INSTANCE_TYPE_ID, this_hardware
from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.resources.deployments import DeployRequest
from selfloop.server.shared.auth import check_may_change
from selfloop.types.errors import BadRequest
from selfloop.types.ids import RunId
from selfloop.types.resources import Checkpoint
from selfloop.types.status import CheckpointTarget
from selfloop.types.uris import CheckpointUri

if TYPE_CHECKING:
    from graphql import GraphQLResolveInfo

_LOOPS_SOURCE = "B10_LOOPS_CHECKPOINTING"
# The command line cannot deploy without naming a secret of the model hub, so this one is understood.
_HUB_TOKEN = "HF_TOKEN"
_NO_SECRET = "none"
_ACCELERATORS = ("T4", "L4", "L40S", "A10G", "V100", "A100", "H100", "H200", "B200", "B300", "GB300")

Json = Mapping[str, Any]
Info: TypeAlias = "GraphQLResolveInfo[Any]"


class Root:
    """The root value of one request. Every method may raise a ``SelfloopError``."""

    def __init__(self, control: Control, caller: Caller) -> None:
        self._control = control
        self._caller = caller

    async def teams(self, info: Info) -> list[Json]:
        teams = await self._control.access.teams_of(self._caller)
        return [{"id": team.id, "name": team.name, "default": team.is_default} for team in teams]

    async def organization(self, info: Info) -> Json:
        # One installation is one organization; its default team is the oldest thing in it and never changes.
        first = await self._control.access.ensure_default_team()
        own = await self._control.access.teams_of(self._caller)
        named = next((team.name for team in own if team.id == self._caller.team_id), first.name)
        return {"id": first.id, "workspace_name": named}

    async def user(self, info: Info) -> Json:
        return {"email": self._caller.key_name}

    async def listed_instances(self, info: Info) -> list[Json]:
        machine = this_hardware()
        # The command line can ask only for GPUs that it has a name for; any other it must be able to pass over.
        accelerator = machine.accelerator if machine.accelerator in _ACCELERATORS else None
        shape = {
            "id": INSTANCE_TYPE_ID,
            "name": "this machine",
            "display_name": machine.gpu_type or "this machine",
            "millicpu_limit": 1000 * machine.cpus,
            "memory_limit": machine.memory_bytes,
            "gpu_count": machine.gpu_count if accelerator else 0,
            "gpu_type": accelerator,
            "gpu_memory": machine.gpu_memory_mib,
            "default": True,
            "node_count": 1,
        }
        return [shape]

    async def create_model_version_from_inference_template(self, info: Info, request: Json) -> Json:
        """Deploy the named Loops checkpoints as one sampler that stays up, under the model's name."""
        check_may_change(self._caller.role)
        secret = _hub_secret(request["inference_stack"]["environment_variables"])
        wanted = DeployRequest(
            checkpoint_ids=_checkpoint_ids(request["weights_sources"]),
            model_name=request["metadata"]["oracle_name"],
            instance_type_id=request["instance_type_id"],
            hf_secret_name=secret,
        )
        checkpoints = await self._control.deploys.check(self._caller, wanted)
        config = json.dumps(_truss_config(wanted.model_name, checkpoints))
        if request["dry_run"]:
            return {"truss_config": config}
        sampler = await self._control.deploys.deploy(self._caller, wanted)
        version = {"id": sampler.deployment_id, "name": wanted.model_name, "model_id": sampler.model_id}
        return {"model_version": version, "truss_config": config}


def _hub_secret(variables: Sequence[Json]) -> str:
    """The name of the hub's secret. The hub is not asked here, so its variable is all that may be set."""
    for index, variable in enumerate(variables):
        if variable["name"] != _HUB_TOKEN:
            field = f"request.inference_stack.environment_variables[{index}]"
            raise BadRequest(
                field, f"only {_HUB_TOKEN}, got {variable['name']}: a sampler runs no container to set it in"
            )
    return next((v["value"] for v in variables if v["is_secret_reference"]), _NO_SECRET)


def _checkpoint_ids(sources: Sequence[Json]) -> list[str]:
    ids: list[str] = []
    for index, source in enumerate(sources):
        field = f"request.weights_sources[{index}]"
        if source["weight_source_type"] != _LOOPS_SOURCE or "b10_training_checkpoint_weights_source" in source:
            raise BadRequest(field, f"{_LOOPS_SOURCE}: this server has no training jobs, only Loops checkpoints")
        named = source.get("b10_loops_checkpoint_weights_source")
        if named is None:
            raise BadRequest(f"{field}.b10_loops_checkpoint_weights_source", "the checkpoint to deploy")
        ids.append(named["checkpoint"]["loops_checkpoint_id"])
    return ids


def _truss_config(name: str, checkpoints: Sequence[Checkpoint]) -> Json:
    """The deployment as a truss configuration describes one: what is served, and on what."""
    machine = this_hardware()
    return {
        "model_name": name,
        "description": "LoRA checkpoints served by Selfloop on its own base model",
        "model_metadata": {
            "base_model": checkpoints[0].base_model,
            "checkpoints": [
                {
                    "name": row.name,
                    "path": str(CheckpointUri(RunId(row.run_id), CheckpointTarget(row.target), row.name)),
                }
                for row in checkpoints
            ],
        },
        "resources": {"cpu": str(machine.cpus), "memory": f"{machine.memory_bytes // 2**20}Mi"},
    }

"""Checkpoints: their files, and what is done with them."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr

from selfloop.server.management.schemas.common import Answer, LoopsLoRAConfigV1, Paged, Request


class LoraAdapterConfigV1(Answer):
    r: int
    lora_alpha: float


class LoopsCheckpointV1(Answer):
    id: str
    checkpoint_id: str = Field(description="The name it was saved under.")
    run_id: str
    base_model: str
    checkpoint_type: Literal["lora"] = "lora"
    created_at: datetime
    lora_adapter_config: LoraAdapterConfigV1
    lora_config: LoopsLoRAConfigV1
    size_bytes: int
    sync_status: Literal["COMPLETE"] = "COMPLETE"
    target: Literal["trainer", "sampler"]
    path: str
    step: int
    expires_at: datetime | None


class ListLoopsCheckpointsResponseV1(Paged):
    checkpoints: list[LoopsCheckpointV1]


class ValidateLoopsCheckpointRequestV1(Request):
    checkpoint_path: StrictStr
    run_id: StrictStr | None = None


class ValidateLoopsCheckpointResponseV1(Answer):
    """Empty: the checkpoint can be used."""


class CheckpointFileV1(Answer):
    url: str
    relative_file_name: str
    node_rank: int = 0
    size_bytes: int
    last_modified: datetime


class LoopsCheckpointFilesResponseV1(Answer):
    presigned_urls: list[CheckpointFileV1]
    next_page_token: int | None
    total_count: int


class LoopsCheckpointS3SourceV1(Answer):
    kind: Literal["s3"] = "s3"


class LoopsCheckpointSourceResponseV1(Answer):
    source: LoopsCheckpointS3SourceV1 = LoopsCheckpointS3SourceV1()


class DeployLoopsCheckpointRequestV1(Request):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    checkpoint_ids: list[StrictStr] = Field(
        description="Sampler checkpoints of one base model; the first is what is served by default."
    )
    model_name: StrictStr = Field(description="A known name gets a further version.")
    instance_type_id: StrictStr = Field(description="This machine's: 'local'.")
    hf_secret_name: StrictStr = Field(description="A label, kept with the deployment: nothing is fetched from a hub.")


class DeployLoopsCheckpointResponseV1(Answer):
    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    deployment_id: str


class DeleteLoopsCheckpointsRequestV1(Request):
    """At least one filter; all that are given must hold."""

    run_id: StrictStr | None = None
    base_model: StrictStr | None = None
    target: Literal["trainer", "sampler"] | None = None
    name: StrictStr | None = Field(None, description="A shell pattern of the names, e.g. 'step-*'.")
    older_than_seconds: Annotated[StrictInt, Field(ge=0)] | None = None
    keep_last: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None, description="Spare the newest so many of each run and target."
    )
    scope: Literal["org"] | None = Field(None, description="'org': of the whole team, not only of your own runs.")
    dry_run: StrictBool = Field(True, description="Only report what would be deleted.")


class KeptCheckpointV1(Answer):
    checkpoint: LoopsCheckpointV1
    reason: str


class DeleteLoopsCheckpointsResponseV1(Answer):
    """What was deleted (with ``dry_run`` what would be), and what matched and stays."""

    dry_run: bool
    deleted: list[LoopsCheckpointV1]
    kept: list[KeptCheckpointV1]
    size_bytes: int = Field(description="Of what was, or would be, deleted.")

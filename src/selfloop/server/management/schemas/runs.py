"""Sessions and runs."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr

from selfloop.control.capacity.placement import Scope
from selfloop.server.management.schemas.common import (
    PINNED,
    SCOPE,
    Answer,
    CapacityId,
    CapacityV1,
    LoopsLoRAConfigV1,
    Paged,
    Request,
    UserV1,
)
from selfloop.server.management.schemas.samplers import LoopsSamplerV1
from selfloop.types.status import RunStatus


class CreateLoopsSessionRequestV1(Request):
    training_project_id: StrictStr | None = Field(None, description="A label of the caller's, kept with the session.")


class CreateLoopsRunRequestV1(Request):
    session_id: StrictStr = Field(description="The session to put the run in.")
    base_model: StrictStr = Field(
        description="A name or alias of the catalogue, such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
    )
    max_seq_len: StrictInt | None = Field(
        None,
        description="Tokens in the longest sequence that you will send; longer ones are refused. Null: as many as the "
        "model has positions.",
    )
    lora_rank: StrictInt = Field(64, description="Inner dimension of the adapter's matrices, 1 to 512.")
    seed: StrictInt | None = Field(
        None,
        description="A fresh adapter is random by it; the same seed gives the same. Null: the answer has one.",
    )
    scale_down_delay_seconds: Annotated[StrictInt, Field(gt=0)] = Field(
        3600, description="The run frees its memory once nobody has asked for anything for so many seconds, at least 1."
    )
    path: StrictStr | None = Field(
        None,
        description="Begin with the weights of this trainer checkpoint in place of a fresh adapter.",
        examples=["bt://loops:9netzzu/weights/captain-resumable"],
    )
    reuse_from_session_id: StrictStr | None = Field(
        None,
        description="Share the trainer deployment of that session's newest usable run. It must be your team's; where "
        "nothing of it can be shared, the run gets capacity of its own, and `capacity` of the answer says why.",
    )
    reuse_from_run_id: StrictStr | None = Field(None, description="The same with the trainer deployment of one run.")
    name: Annotated[StrictStr, Field(min_length=1, max_length=255)] | None = Field(
        None, description="Display name. Defaults to the base model's."
    )
    availability_model: Literal["dedicated", "spot"] = Field(
        "dedicated", description="Only 'dedicated': this server's capacity is never preempted."
    )
    scope: Scope = SCOPE
    keep_last_checkpoints: StrictInt | None = Field(
        None,
        description="Keep only so many of the newest trainer checkpoints and of the newest sampler checkpoints; "
        "what a live sampler or a queued operation needs stays. Null keeps all.",
    )
    replicas: StrictInt = Field(1, description="Only 1.")
    sampler_num_replicas: StrictInt | None = Field(None, description="Only 1.")
    base_checkpoint: StrictStr | None = Field(
        None,
        description="Train on these weights in place of the base model's, whose architecture they have: "
        "hf://<org>/<repo>@<revision>, as `selfloop models add <org>/<repo> --revision <revision>` put it here.",
    )


class CreateLoopsTrainerRequestV1(CreateLoopsRunRequestV1):
    """The same as for a run, whose sampler is made later, if at all."""


class LoopsRunStatusV1(Answer):
    name: RunStatus


class LoopsRunV1(Answer):
    id: str = Field(description="Names the run in paths and in bt:// URIs.")
    session_id: str = Field(description="As asked for.")
    base_model: str = Field(
        description="What is adapted, by the name that it was asked for under; a base checkpoint by the name that it "
        "has here."
    )
    base_url: str = Field(description="Operations of the run are posted below it.")
    created_at: datetime = Field(description="When it was made, in UTC.")
    sampler: LoopsSamplerV1 = Field(description="Samples what the run publishes.")
    name: str
    deployment_id: CapacityId
    lora_rank: int
    max_seq_len: int
    seed: int
    status: LoopsRunStatusV1
    user: UserV1
    lora_config_version: str
    lora_config: LoopsLoRAConfigV1
    keep_last_checkpoints: int | None
    capacity: CapacityV1
    base_checkpoint: str | None = Field(description=PINNED)


class LoopsTrainerRunV1(LoopsRunV1):
    """A run that may not have its sampler yet."""

    sampler: LoopsSamplerV1 | None = None  # type: ignore[assignment]


class CreateLoopsRunResponseV1(Answer):
    run: LoopsRunV1


class CreateLoopsTrainerResponseV1(Answer):
    run: LoopsTrainerRunV1


class GetLoopsRunResponseV1(Answer):
    run: LoopsTrainerRunV1


class ListLoopsRunsResponseV1(Paged):
    runs: list[LoopsTrainerRunV1]


class LoopsSessionV1(Answer):
    id: str


class CreateLoopsSessionResponseV1(Answer):
    session: LoopsSessionV1


class GetLoopsSessionResponseV1(Answer):
    session: LoopsSessionV1

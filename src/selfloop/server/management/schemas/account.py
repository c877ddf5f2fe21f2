"""What the server has, and what a team has set."""

from datetime import datetime

from pydantic import ConfigDict, StrictStr

from selfloop.server.management.schemas.common import Answer, InstanceTypeV1, Request


class EnablementDetailsV1(Answer):
    """Why a model cannot be used now, and what would change that."""

    reason: str
    reason_detail: str
    remediation: str


class SupportedModelV1(Answer):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    max_seq_len: int
    max_enabled_seq_len: int
    max_context_length: int
    supports_vision_language: bool = False
    enabled: bool = True
    serverless: bool = False
    enablement_details: EnablementDetailsV1 | None = None


class GetLoopsCapabilitiesResponseV1(Answer):
    supported_models: list[SupportedModelV1]


class TeamV1(Answer):
    id: str
    name: str
    default: bool
    created_at: datetime


class TeamsV1(Answer):
    teams: list[TeamV1]


class LoopsUserConfigV1(Answer):
    trainer_accelerator_priority: list[str] | None
    sampler_accelerator_priority: list[str] | None


class GetLoopsUserConfigResponseV1(Answer):
    user_config: LoopsUserConfigV1


class PatchLoopsUserConfigResponseV1(Answer):
    user_config: LoopsUserConfigV1


class PatchLoopsUserConfigRequestV1(Request):
    """Omit to leave, null to clear, a list to set."""

    trainer_accelerator_priority: list[StrictStr] | None = None
    sampler_accelerator_priority: list[StrictStr] | None = None


class InstanceTypesV1(Answer):
    instance_types: list[InstanceTypeV1]


class InstanceTypeWithPriceV1(Answer):
    instance_type: InstanceTypeV1
    price: float = 0.0
    """USD a minute: nothing, it is your machine."""


class InstanceTypePricesV1(Answer):
    instance_types: list[InstanceTypeWithPriceV1]

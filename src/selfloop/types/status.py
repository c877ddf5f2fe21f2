"""Statuses, with the hosted API's own names. Only ``control.lifecycle`` changes them."""

from enum import StrEnum


class RunStatus(StrEnum):
    ACTIVE = "ACTIVE"
    INACTIVE = "INACTIVE"


class DeploymentStatus(StrEnum):
    """Status of trainer capacity."""

    CREATED = "CREATED"
    DEPLOYING = "DEPLOYING"
    RUNNING = "RUNNING"
    SCALED_TO_ZERO = "SCALED_TO_ZERO"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    PREEMPTED = "PREEMPTED"


class SamplerStatus(StrEnum):
    """Status of sampling capacity (``DeploymentStatusV1`` in the hosted API)."""

    BUILDING = "BUILDING"
    DEPLOYING = "DEPLOYING"
    DEPLOY_FAILED = "DEPLOY_FAILED"
    LOADING_MODEL = "LOADING_MODEL"
    ACTIVE = "ACTIVE"
    UNHEALTHY = "UNHEALTHY"
    BUILD_FAILED = "BUILD_FAILED"
    BUILD_STOPPED = "BUILD_STOPPED"
    DEACTIVATING = "DEACTIVATING"
    INACTIVE = "INACTIVE"
    FAILED = "FAILED"
    UPDATING = "UPDATING"
    SCALED_TO_ZERO = "SCALED_TO_ZERO"
    WAKING_UP = "WAKING_UP"


class OperationState(StrEnum):
    """Life of an accepted operation: queued until its result (or its error) is stored."""

    QUEUED = "queued"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"


class CheckpointTarget(StrEnum):
    """What a checkpoint is for; an external one is only downloaded."""

    TRAINER = "trainer"
    SAMPLER = "sampler"
    EXTERNAL = "external"

"""Fields of the JSON requests, each within the range that is served."""

import math
from typing import Any

import pyrage

from selfloop.control.gateway import Control
from selfloop.server.shared.auth import authenticated_key
from selfloop.server.tinker import wire
from selfloop.types.errors import BadRequest, Denied
from selfloop.types.operation import AdamParams
from selfloop.types.uris import NAME_RULE, is_checkpoint_name

# The extension module comes without types.
_age: Any = pyrage
_MAX_ADAM = 1e9
_MAX_RECIPIENTS = 20
_MAX_TTL_S = 10 * 366 * 24 * 3600


def optimizer(config: wire.OptimizerConfig | None) -> None:
    if config is not None and (config.type != "adamw" or config.version is not None):
        raise BadRequest("optimizer_config.type", f"adamw, the optimizer of this server; got {config.type[:100]!r}")


def adam_params(body: wire.OptimStep) -> AdamParams:
    """The step's hyper-parameters, each within the range where AdamW is defined."""
    if body.optimizer_params is not None or body.adam_params is None:
        raise BadRequest("optimizer_params", "null, and adam_params: AdamW is the optimizer of this server")
    adam = body.adam_params
    for name, limit in (
        ("learning_rate", _MAX_ADAM),
        ("beta1", 1.0),
        ("beta2", 1.0),
        ("eps", _MAX_ADAM),
        ("weight_decay", _MAX_ADAM),
        ("grad_clip_norm", math.inf),
    ):
        value = getattr(adam, name)
        if not (math.isfinite(value) and 0 <= value < limit):
            raise BadRequest(f"adam_params.{name}", f"a finite number from 0 to below {limit:g}, got {value}")
    return AdamParams(adam.learning_rate, adam.beta1, adam.beta2, adam.eps, adam.weight_decay, adam.grad_clip_norm)


def checkpoint_name(name: str) -> str:
    if not is_checkpoint_name(name):
        raise BadRequest("path", f"a checkpoint's name: {NAME_RULE}; got {name[:200]!r}")
    return name


def age_recipients(recipients: list[str] | None) -> list[str]:
    """Keys to encrypt to; none for files as they are."""
    if recipients is None:
        return []
    if not 1 <= len(recipients) <= _MAX_RECIPIENTS:
        raise BadRequest("age_encryption_recipients", f"null, or 1 to {_MAX_RECIPIENTS} recipients")
    for recipient in recipients:
        try:
            _age.x25519.Recipient.from_str(recipient)
        except _age.RecipientError:
            raise BadRequest(
                "age_encryption_recipients", f"public X25519 keys of age (age1...), got {recipient[:100]!r}"
            ) from None
    return recipients


def ttl_seconds(value: int | None) -> int | None:
    if value is not None and not 1 <= value <= _MAX_TTL_S:
        raise BadRequest("ttl_seconds", f"null, or 1 to {_MAX_TTL_S} seconds; got {value}")
    return value


async def granted_team(control: Control, token: str | None) -> str | None:
    """The team that a ``weights_access_token``, which is an API key of that team, opens the checkpoints of.

    Raises:
        BadRequest: it is no key of this server.
    """
    if token is None:
        return None
    try:
        return (await authenticated_key(control.access, token)).team_id
    except Denied:
        raise BadRequest("weights_access_token", "an API key of the team that the checkpoint belongs to") from None

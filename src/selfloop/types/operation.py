"""The operations of a run, as journalled and as sent to the worker; each declares how a run's queue treats its kind."""

from typing import ClassVar, get_args

import msgspec

from selfloop.types.custom_loss import CustomLoss
from selfloop.types.datum import Datum


class AdamParams(msgspec.Struct, frozen=True):
    """AdamW hyper-parameters of one step. ``grad_clip_norm`` 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 1.0


class Kind(msgspec.Struct, frozen=True):
    """The traits that every kind of operation has, unless it says otherwise."""

    changes_state: ClassVar[bool] = False
    """It changes the run's training state: recovery replays it on top of a snapshot."""

    writes_checkpoint: ClassVar[bool] = False
    reads_checkpoint: ClassVar[bool] = False

    exclusive: ClassVar[bool] = False
    """It finds the worker's queue of the run empty, and nothing is sent before its own snapshot is stored."""

    starts_epoch: ClassVar[bool] = False
    """With it a client that attaches begins to count anew."""


class InitTrainer(Kind, frozen=True, tag="init_trainer_server"):
    """Back to the run's starting weights, at ``lora_rank``; optimizer and step count start anew."""

    changes_state: ClassVar[bool] = True
    starts_epoch: ClassVar[bool] = True

    lora_rank: int


class Forward(Kind, frozen=True, tag="forward"):
    """Loss and logprobs without gradient; accumulated gradients stay untouched.

    ``summed``: the loss is the plain sum over tokens, whatever the loss. With ``custom`` it is that loss,
    whatever its name.
    """

    data: list[Datum]
    loss_fn: str
    loss_config: dict[str, float | bool]
    top_k_logprobs: int = 0
    summed: bool = False
    custom: CustomLoss | None = None


class ForwardBackward(Kind, frozen=True, tag="forward_backward"):
    """Loss, logprobs and gradients, added to what is already accumulated.

    ``summed``: the loss is the plain sum over tokens, and the step does not divide it. ``custom`` is
    as in :class:`Forward`.
    """

    changes_state: ClassVar[bool] = True

    data: list[Datum]
    loss_fn: str
    loss_config: dict[str, float | bool]
    top_k_logprobs: int = 0
    summed: bool = False
    custom: CustomLoss | None = None


class OptimStep(Kind, frozen=True, tag="optim_step"):
    """Normalise, clip and apply the accumulated gradients, then clear them."""

    changes_state: ClassVar[bool] = True

    adam: AdamParams


class SaveState(Kind, frozen=True, tag="save_state"):
    """Write a trainer checkpoint (adapter, moments, step). ``user_metadata`` is kept beside it."""

    writes_checkpoint: ClassVar[bool] = True

    checkpoint_id: str
    name: str
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class SaveWeightsForSampler(Kind, frozen=True, tag="save_weights_for_sampler"):
    """Write a sampler checkpoint (PEFT adapter); ``publish`` makes it the live adapter of the paired sampler.

    With ``sampler_id`` it is for that sampler alone: no URI names it. With ``inflight`` all samplers that follow the
    run go over to it.
    """

    writes_checkpoint: ClassVar[bool] = True

    checkpoint_id: str
    name: str
    publish: bool
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    sampler_id: str | None = None
    inflight: bool = False


class SaveWeightsExternal(Kind, frozen=True, tag="save_weights_external"):
    """Write the adapter to be downloaded (PEFT, of ``base_model``), each file encrypted when there are ``recipients``.

    ``recipients`` are age's (``age1...``): any of their keys opens the files.
    """

    writes_checkpoint: ClassVar[bool] = True

    checkpoint_id: str
    name: str
    base_model: str
    recipients: list[str]
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None


class LoadState(Kind, frozen=True, tag="load_state"):
    """Replace the weights by a checkpoint's; with ``with_optimizer`` also moments and step.

    ``reader_team_id`` is another team whose checkpoints the caller has shown to have access to.
    """

    changes_state: ClassVar[bool] = True
    reads_checkpoint: ClassVar[bool] = True
    exclusive: ClassVar[bool] = True

    path: str
    with_optimizer: bool
    reader_team_id: str | None = None


Save = SaveState | SaveWeightsForSampler | SaveWeightsExternal
Operation = InitTrainer | Forward | ForwardBackward | OptimStep | Save | LoadState

operation_decoder: "msgspec.msgpack.Decoder[Operation]" = msgspec.msgpack.Decoder(Operation)


def kind_of(operation: Operation | type[Operation]) -> str:
    """The operation's tag, e.g. ``"forward_backward"``."""
    return str(operation.__struct_config__.tag)


KINDS: dict[str, type[Operation]] = {kind_of(kind): kind for kind in get_args(Operation)}


def traits_of(kind: str) -> type[Kind]:
    """What a stored kind declares. A damaged one declares nothing: its payload is refused when it is read."""
    return KINDS.get(kind, Kind)


CHANGES_STATE: frozenset[str] = frozenset(name for name, kind in KINDS.items() if kind.changes_state)

"""Results of operations, as stored and as read by the dialects."""

import msgspec

from selfloop.types.datum import Tensor
from selfloop.types.status import CheckpointTarget


class Spent(msgspec.Struct, frozen=True):
    """What a piece of work took: seconds of the worker's time, tokens that went through the model."""

    device_s: float = 0.0
    num_tokens: int = 0


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    spent: Spent = Spent()


class InitResult(_Result, frozen=True, tag="init_trainer_server"):
    step: int
    lora_rank: int


class LossResult(_Result, frozen=True, tag="loss"):
    """Result of forward and forward_backward.

    Args:
        loss: mean over the request's trained tokens, or pairs (the plain sum with ``skip_token_normalization``).
        logprobs: one float32 tensor per datum, in the shape of its targets; NaN where masked.
        metrics: plain numbers.
        topk_tokens: one int64 (N, k) tensor per datum, the likeliest first; -1 where masked. Empty unless asked for.
        topk_logprobs: their logprobs, float32 (N, k); NaN where masked.
    """

    loss: float
    logprobs: list[Tensor]
    metrics: dict[str, float]
    topk_tokens: list[Tensor] = []
    topk_logprobs: list[Tensor] = []


class StepResult(_Result, frozen=True, tag="optim_step"):
    metrics: dict[str, float]


class Probe(msgspec.Struct, frozen=True):
    """What the trainer makes of a short text, at the instant that its weights are published.

    Args:
        tokens: the text.
        logprobs: of its tokens but the first; NaN where the weights give no finite ones.
        bound: how far a sampler of the same weights may be off in the mean, in nats.
        equals_base: the adapter changes nothing of the base model.
    """

    tokens: list[int]
    logprobs: list[float]
    bound: float
    equals_base: bool = False


class SaveResult(_Result, frozen=True, tag="save"):
    """A checkpoint written whole: its name, step count, rank and size on disk; ``target`` says for whom.

    ``probe`` is there where a sampler is to serve it at once.
    """

    checkpoint_id: str
    name: str
    target: CheckpointTarget
    step: int
    lora_rank: int
    lora_alpha: float
    size_bytes: int
    probe: Probe | None = None


class LoadResult(_Result, frozen=True, tag="load_state"):
    step: int
    lora_rank: int


Result = InitResult | LossResult | StepResult | SaveResult | LoadResult

result_decoder: "msgspec.msgpack.Decoder[Result]" = msgspec.msgpack.Decoder(Result)

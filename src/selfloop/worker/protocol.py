"""The one contract between control and worker: typed messages over a pair of sockets.

Control sends a :class:`Call` frame, for ``Execute`` followed by the operation's own bytes; the worker answers
each call once, with ``Reply`` (followed by the result's bytes) or ``ReplyError``, and reports its start with
``Loading``, ``Ready`` and ``LoadFailed``. Calls about one run are carried out in the order they were sent. No message
has a path: what a worker reads or writes is a :class:`BlobRef`, as it may be on another machine.
"""

import msgspec

from selfloop.types.blob_ref import BlobRef
from selfloop.types.lora import LoraTargets
from selfloop.types.sampling import SampleRequest


class OpenRun(msgspec.Struct, frozen=True, tag=True):
    """Bring a run into the worker: from ``snapshot``, else fresh (or from the ``initial`` checkpoint folder).

    ``with_optimizer`` takes the moments and the step of ``initial``, too.
    """

    run_id: str
    lora_rank: int
    seed: int
    initial: BlobRef | None
    snapshot: BlobRef | None
    targets: LoraTargets = LoraTargets()
    with_optimizer: bool = False


class CloseRun(msgspec.Struct, frozen=True, tag=True):
    """Forget a run and free its memory."""

    run_id: str


class Execute(msgspec.Struct, frozen=True, tag=True):
    """Carry out one operation; its msgpack bytes are the second frame.

    Args:
        read_from: folder of the checkpoint to load, for ``load_state``.
        write_to: folder to create and sync, for the two saves.
        initial: folder of the run's starting checkpoint, for ``init_trainer_server``.
        seed: the run's seed, for ``init_trainer_server``.
        targets: what the run's fresh adapter changes, for ``init_trainer_server``.
        alone: compute nothing of other runs with it, nor between its begin and its end. So a repetition of what was
            computed alone gives the same bits, and the one of several that ends the worker is found.
    """

    run_id: str
    seed: int
    alone: bool = False
    read_from: BlobRef | None = None
    write_to: BlobRef | None = None
    initial: BlobRef | None = None
    targets: LoraTargets = LoraTargets()


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """Write the run's whole state (accumulated gradients included) to a new folder and sync it; replies ``Written``.

    Args:
        background: copy the state in its turn, and write the copy while the calls behind this one go on. Refused
            with the class ``Busy`` while another copy is being written.
    """

    run_id: str
    write_to: BlobRef
    background: bool = False


class Written(msgspec.Struct, frozen=True):
    """What a snapshot took from the work beside it: seconds of the main loop, and of a processor."""

    stall_s: float
    cpu_s: float


class Sample(msgspec.Struct, frozen=True, tag=True):
    """Sample; joins the batch that is running.

    Args:
        stream: send ``Partial`` events with the msgpack bytes of ``list[SampleDelta]`` before the reply.
    """

    request: SampleRequest
    stream: bool = False


class Tokenize(msgspec.Struct, frozen=True, tag=True):
    """Token ids of each text, as the model's tokenizer makes them; the reply is ``list[list[int]]``.

    Args:
        team_id: whose turn it takes.
        max_tokens: a text that must be longer is refused before it is tokenized; None takes any.
    """

    texts: list[str]
    add_special_tokens: bool = True
    team_id: str = ""
    max_tokens: int | None = None


class Detokenize(msgspec.Struct, frozen=True, tag=True):
    """What each token stands for; the reply is ``list[bytes]``."""

    tokens: list[int]


class RenderedChat(msgspec.Struct, frozen=True):
    """A conversation's token ids, in which each image is one placeholder yet.

    Args:
        images: where those of images are, in the order of the images.
    """

    tokens: list[int]
    images: list[int] = []


class RenderChat(msgspec.Struct, frozen=True, tag=True):
    """Token ids of a conversation in the model's own chat template; the reply is a :class:`RenderedChat`.

    Args:
        messages: JSON of the list of messages.
        tools: JSON of the list of tools, if any.
        options: JSON of an object of further variables of the template.
        team_id: whose turn it takes.
        max_tokens: as of :class:`Tokenize`, of the text that the template makes.
        num_images: parts of the messages that are images, ``{"type": "image"}``.
    """

    messages: bytes
    tools: bytes | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    options: bytes | None = None
    team_id: str = ""
    max_tokens: int | None = None
    num_images: int = 0


class CancelSample(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this sample any more."""

    request_id: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish the call in hand and exit."""


Command = (
    OpenRun | CloseRun | Execute | Snapshot | Sample | CancelSample | Tokenize | Detokenize | RenderChat | Shutdown
)


class Call(msgspec.Struct, frozen=True):
    """A command with the ticket that its answer will carry."""

    ticket: int
    command: Command


class Capabilities(msgspec.Struct, frozen=True):
    """What a worker does. What it does not is refused by control, in words, before it is sent.

    Args:
        trains: runs and their operations.
        samples: samples, alone or with others.
        streams: ``Partial`` events of a sample, before its reply.
        structured_output: samples that must match a grammar.
        prompt_logprobs: logprobs of a prompt's tokens.
        exact_replay: the same operations on the same state give the same bits, whatever is computed beside them.
        routes: records and replays which experts tokens go to.
    """

    trains: bool = True
    samples: bool = True
    streams: bool = True
    structured_output: bool = True
    prompt_logprobs: bool = True
    exact_replay: bool = True
    routes: bool = False


class ModelInfo(msgspec.Struct, frozen=True):
    """The base model as the worker holds it.

    Args:
        max_position_embeddings: longest sequence, of training and of sampling, in tokens.
        run_bytes: what open runs may take in all.
        computed_by: what multiplies by its weights.
    """

    vocab_size: int
    max_position_embeddings: int
    num_parameters: int
    dtype: str
    device: str
    run_bytes: int = 2**63
    computed_by: str = ""
    can: Capabilities = Capabilities()


class Loading(msgspec.Struct, frozen=True, tag=True):
    """The base model is being loaded."""

    stage: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The base model is in memory; calls sent before are carried out now."""

    info: ModelInfo


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The base model cannot be served; the worker exits. ``error_class`` says whether it ever can."""

    cause: str
    error_class: str = "LoadFailed"


class Partial(msgspec.Struct, frozen=True, tag=True):
    """The call has something to show before its answer; the bytes are the second frame."""

    ticket: int


class Dying(msgspec.Struct, frozen=True, tag=True):
    """The process ends itself: its device takes no more work."""

    cause: str


class Reply(msgspec.Struct, frozen=True, tag=True):
    """The call succeeded; its result's msgpack bytes (perhaps none) are the second frame."""

    ticket: int


class ReplyError(msgspec.Struct, frozen=True, tag=True):
    """The call failed and changed nothing; the worker goes on.

    Args:
        state_lost: the run may have been left half-changed, so the worker has forgotten it: it must be opened again.
    """

    ticket: int
    error: str
    error_class: str
    state_lost: bool = False


Event = Loading | Ready | LoadFailed | Dying | Partial | Reply | ReplyError


class Heartbeat(msgspec.Struct, frozen=True):
    """Sent over a socket of its own, by a thread of its own: seconds that the main loop has been at one thing."""

    busy_s: float


call_decoder = msgspec.msgpack.Decoder(Call)
heartbeat_decoder = msgspec.msgpack.Decoder(Heartbeat)
event_decoder: "msgspec.msgpack.Decoder[Event]" = msgspec.msgpack.Decoder(Event)
encode = msgspec.msgpack.encode

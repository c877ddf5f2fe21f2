"""A worker's life: take calls from its gateway until it is asked to stop."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zmq

from selfloop.engine.engine import Engine
from selfloop.engine.models.registry import read_spec
from selfloop.types.digests import check_folder
from selfloop.types.errors import MODEL_INVALID, OperationFailed, model_invalid
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.types.settings import EngineSettings
from selfloop.worker.images.pixels import PixelReader
from selfloop.worker.launchers.fork_protocol import ForkWorker
from selfloop.worker.protocol import Capabilities, LoadFailed, Loading, ModelInfo, Ready
from selfloop.worker.serving.background import Heartbeats
from selfloop.worker.serving.loop import Worker
from selfloop.worker.serving.replies import Replies
from selfloop.worker.serving.sampling import SamplingQueue
from selfloop.worker.serving.staging import SharedDisk
from selfloop.worker.serving.training import TrainingQueue
from selfloop.worker.text.calls import TextQueue
from selfloop.worker.text.chat import ChatTemplate
from selfloop.worker.text.grammars import GrammarCompiler

log = logging.getLogger("selfloop.worker")


class Model(NamedTuple):
    """A base model in memory, and what its tokens and conversations are."""

    engine: Engine
    tokenizer: ModelTokenizer
    chat: ChatTemplate


def load_model(model_dir: Path, settings: EngineSettings) -> Model:
    """Read a prepared model folder, checked where it was written by us; see :meth:`Engine.load`."""
    check_folder(model_dir)
    spec = read_spec(model_dir)
    try:
        tokenizer = ModelTokenizer.load(model_dir, spec.vocab_size)
    except Exception as error:  # The library raises the base class for every file that it cannot read.
        raise model_invalid(f"the tokenizer of {model_dir} cannot be read: {error}") from error
    chat = ChatTemplate.load(model_dir, tokenizer)
    engine = Engine.load(
        model_dir,
        device=settings.device,
        dtype=settings.dtype,
        base_dtype=settings.base_dtype,
        vocabulary=tokenizer,
        compile_grammar=GrammarCompiler(tokenizer, spec.vocab_size, list(spec.eos_token_ids)),
        read_pixels=PixelReader(),
        deterministic=settings.deterministic,
        limits=settings.limits,
    )
    log.info("loaded %s: %s", model_dir, engine.info)
    return Model(engine, tokenizer, chat)


def load_failure(error: Exception) -> tuple[str, str]:
    """Why a model could not be loaded, and the kind of error: its folder's, or one that may pass."""
    if isinstance(error, OperationFailed) and error.error_class == MODEL_INVALID:
        return str(error), MODEL_INVALID
    return f"{type(error).__name__}: {error}", "LoadFailed"


def run_worker(order: ForkWorker, load: Callable[[], Model]) -> None:
    """Serve the gateway at ``order``'s addresses to the end; raises SystemExit when the model cannot be loaded."""
    heartbeats = Heartbeats(order.heartbeat_address)
    heartbeats.start()
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(order.address)
    replies = Replies(socket, Path(order.begun_path))
    try:
        replies.send(Loading("loading the base model"))
        engine, tokenizer, chat = load()
    except Exception as error:  # Reported to the gateway, which shows it to whoever waits for this model.
        log.exception("cannot load the model")
        replies.send(LoadFailed(*load_failure(error)))
        socket.close(linger=2000)
        zmq.Context.instance().term()
        raise SystemExit(1) from error
    info = engine.info
    ready = Ready(
        ModelInfo(
            info.vocab_size,
            info.max_position_embeddings,
            info.num_parameters,
            str(info.dtype),
            str(info.device),
            info.run_bytes,
            info.computed_by,
            Capabilities(exact_replay=info.exact_replay, routes=info.routes),
        )
    )
    replies.send(ready)
    staging = SharedDisk({name: Path(root) for name, root in order.roots.items()})
    training, sampling = TrainingQueue(engine, staging, replies), SamplingQueue(engine, staging, replies)
    text = TextQueue(tokenizer, chat, replies)
    Worker(socket, replies, heartbeats, training, sampling, text, training_share=order.settings.training_share).run()

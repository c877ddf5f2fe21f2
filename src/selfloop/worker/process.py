"""The worker process: loads an engine, then takes calls from its gateway until it is told to stop."""

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import zmq

from selfloop.engine.engine import Engine
from selfloop.engine.models.config import read_config
from selfloop.types.logline import JsonFormatter
from selfloop.worker.background import Pulse
from selfloop.worker.chat import ChatTemplate
from selfloop.worker.drawing import SamplingDesk
from selfloop.worker.grammars import GrammarCompiler
from selfloop.worker.launch_local import DEFAULT_TRAINING_SHARE
from selfloop.worker.loop import Worker
from selfloop.worker.outbox import Outbox
from selfloop.worker.protocol import LoadFailed, Loading, ModelInfo, Ready
from selfloop.worker.text import TextDesk
from selfloop.worker.tokens import ModelTokenizer
from selfloop.worker.training import TrainingDesk

log = logging.getLogger("selfloop.worker")

_PR_SET_PDEATHSIG = 1


def _die_with(parent_pid: int) -> None:
    """End this process when its gateway is gone: the next gateway starts workers of its own."""
    if sys.platform == "linux":
        # At once, so that no late write of ours meets the next worker's.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.5)
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--pulse-address", required=True)
    parser.add_argument("--begun-file", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--training-share", type=float, default=DEFAULT_TRAINING_SHARE)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--activation-bytes", type=int)
    parser.add_argument("--kept-bytes", type=int)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args()

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _die_with(options.parent_pid)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)

    pulse = Pulse(options.pulse_address)
    pulse.start()
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(options.address)
    outbox = Outbox(socket, options.begun_file)
    try:
        outbox.send(Loading("loading the base model"))
        tokenizer = ModelTokenizer.load(options.model_dir)
        chat = ChatTemplate.load(options.model_dir, tokenizer)
        config = read_config(options.model_dir)
        engine = Engine.load(
            options.model_dir,
            device=options.device,
            dtype=options.dtype,
            vocabulary=tokenizer,
            compile_grammar=GrammarCompiler(tokenizer, config.vocab_size, list(config.eos_token_ids)),
            deterministic=options.deterministic,
            activation_bytes=options.activation_bytes,
            kept_bytes=options.kept_bytes,
        )
    except Exception as error:  # Reported to the gateway, which shows it to whoever waits for this model.
        log.exception("cannot load %s", options.model_dir)
        outbox.send(LoadFailed(f"{type(error).__name__}: {error}"))
        socket.close(linger=2000)
        raise SystemExit(1) from error
    info = engine.info
    log.info("loaded %s: %s", options.model_dir, info)
    ready = Ready(
        ModelInfo(info.vocab_size, info.max_position_embeddings, info.num_parameters, str(info.dtype), str(info.device))
    )
    outbox.send(ready)
    training, sampling = TrainingDesk(engine, outbox), SamplingDesk(engine, outbox)
    text = TextDesk(tokenizer, chat)
    Worker(socket, outbox, pulse, training, sampling, text, training_share=options.training_share).run()


if __name__ == "__main__":
    main()

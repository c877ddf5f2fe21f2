"""The worker process: owns an engine, takes calls from its gateway, shares the device between their kinds."""

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import zmq

from selfloop.engine.engine import Engine
from selfloop.engine.models.config import read_config
from selfloop.types.errors import BadRequest, NotFound, OperationFailed
from selfloop.types.logline import JsonFormatter, Scope, bind_only
from selfloop.types.operation import (
    Forward,
    ForwardBackward,
    InitTrainer,
    LoadState,
    Operation,
    OptimStep,
    SaveState,
    SaveWeightsExternal,
    SaveWeightsForSampler,
)
from selfloop.types.result import Result, SaveResult, Spent
from selfloop.types.sampling import SampleRequest
from selfloop.types.status import CheckpointTarget
from selfloop.worker.chat import ChatTemplate
from selfloop.worker.encryption import encrypt_folder
from selfloop.worker.grammars import GrammarCompiler
from selfloop.worker.protocol import (
    Begun,
    Call,
    CancelSample,
    CloseRun,
    Detokenize,
    Event,
    Execute,
    LoadFailed,
    Loading,
    ModelInfo,
    OpenRun,
    Partial,
    Ready,
    RenderChat,
    Reply,
    ReplyError,
    Sample,
    Shutdown,
    Snapshot,
    Tokenize,
    call_decoder,
    encode,
)
from selfloop.worker.tokens import MAX_CHARS, ModelTokenizer

log = logging.getLogger("selfloop.worker")

_operation_decoder: "msgspec.msgpack.Decoder[Operation]" = msgspec.msgpack.Decoder(Operation)
_IDLE_POLL_MS = 1000
_PR_SET_PDEATHSIG = 1


class Worker:
    """One loop, one thread: receive, then give the device to whichever kind of work had less of it."""

    def __init__(
        self, socket: "zmq.Socket[bytes]", engine: Engine, tokenizer: ModelTokenizer, chat: ChatTemplate
    ) -> None:
        self._socket = socket
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat = chat
        # Calls of one run in order; runs take turns.
        self._queues: dict[str, deque[tuple[Call, bytes]]] = {}
        self._turns: deque[str] = deque()
        self._samples: dict[str, int] = {}
        self._train_s = 0.0
        self._sample_s = 0.0
        # Seconds that each sampling request has had of the device since the start: a step is shared evenly.
        self._share_s = 0.0
        self._share_at_submit_s: dict[str, float] = {}
        self._stopping = False

    def run(self) -> None:
        while not self._stopping:
            self._receive()
            training, sampling = bool(self._turns), self._engine.num_sampling > 0
            if training and sampling:
                self._share()
            elif training:
                self._train_s = self._sample_s = 0.0
                self._train_once()
            elif sampling:
                self._train_s = self._sample_s = 0.0
                self._sample_once()

    def _share(self) -> None:
        # Equal time to each while both have work, so that neither starves.
        started = time.monotonic()
        if self._train_s <= self._sample_s:
            self._train_once()
            self._train_s += time.monotonic() - started
        else:
            self._sample_once()
            self._sample_s += time.monotonic() - started

    def _receive(self) -> None:
        busy = bool(self._turns) or self._engine.num_sampling > 0
        while self._socket.poll(0 if busy else _IDLE_POLL_MS):
            frames = self._socket.recv_multipart()
            self._accept(call_decoder.decode(frames[0]), frames[1])
            busy = True

    def _accept(self, call: Call, payload: bytes) -> None:
        match call.command:
            case OpenRun(run_id=run_id) | CloseRun(run_id=run_id) | Execute(run_id=run_id) | Snapshot(run_id=run_id):
                queue = self._queues.setdefault(run_id, deque())
                queue.append((call, payload))
                if len(queue) == 1:
                    self._turns.append(run_id)
            case Sample(request, stream):
                self._guard(call.ticket, lambda: self._submit(call.ticket, request, stream=stream))
            case CancelSample(request_id):
                self._engine.cancel_sample(request_id)
                self._share_at_submit_s.pop(request_id, None)
                ticket = self._samples.pop(request_id, None)
                if ticket is not None:
                    self._send(ReplyError(ticket, "the sample was cancelled", "Cancelled"))
                self._send(Reply(call.ticket))
            case Tokenize() as tokenize:
                self._guard(call.ticket, lambda: self._answer(call.ticket, self._tokenize(tokenize)))
            case Detokenize(tokens):
                self._answer(call.ticket, [self._tokenizer.token_bytes(token) for token in tokens])
            case RenderChat() as conversation:
                self._guard(call.ticket, lambda: self._answer(call.ticket, self._chat.tokens(conversation)))
            case Shutdown():
                self._stopping = True

    def _tokenize(self, command: Tokenize) -> list[list[int]]:
        if sum(map(len, command.texts)) > MAX_CHARS:
            raise BadRequest("prompt", f"at most {MAX_CHARS} characters")
        return [self._tokenizer.encode(text, add_special_tokens=command.add_special_tokens) for text in command.texts]

    def _answer(self, ticket: int, result: object) -> None:
        self._send(Reply(ticket), encode(result))

    def _submit(self, ticket: int, request: SampleRequest, *, stream: bool) -> None:
        adapter = request.adapter
        if adapter is not None and not self._engine.has_adapter(adapter.checkpoint_id):
            self._engine.load_adapter(adapter.checkpoint_id, Path(adapter.path))
        self._engine.submit_sample(request, stream=stream)
        self._share_at_submit_s[request.request_id] = self._share_s
        self._samples[request.request_id] = ticket

    def _sample_once(self) -> None:
        num_requests, started = max(len(self._share_at_submit_s), 1), time.monotonic()
        results = self._engine.sample_step()
        self._share_s += (time.monotonic() - started) / num_requests
        for request_id, deltas in self._engine.take_sample_deltas().items():
            self._send(Partial(self._samples[request_id]), encode(deltas))
        for result in results:
            spent = Spent(self._share_s - self._share_at_submit_s.pop(result.request_id))
            result = msgspec.structs.replace(result, spent=spent)
            self._send(Reply(self._samples.pop(result.request_id)), encode(result))
        for request_id, error in self._engine.take_failed_samples():
            self._share_at_submit_s.pop(request_id, None)
            self._send(ReplyError(self._samples.pop(request_id), str(error), error.error_class))

    def _train_once(self) -> None:
        run_id = self._turns.popleft()
        bind_only(Scope(run_id=run_id))
        queue = self._queues[run_id]
        call, payload = queue.popleft()
        if queue:
            self._turns.append(run_id)
        else:
            del self._queues[run_id]
        self._guard(call.ticket, lambda: self._perform(call, payload))
        bind_only(Scope())

    def _perform(self, call: Call, payload: bytes) -> None:
        body = b""
        match call.command:
            case OpenRun() as open_run:
                self._open(open_run)
            case CloseRun(run_id):
                self._engine.remove_run(run_id)
            case Snapshot(run_id, write_to):
                self._engine.snapshot(run_id, Path(write_to))
            case Execute() as execute:
                self._send(Begun(call.ticket))
                operation = _operation_decoder.decode(payload)
                started = time.monotonic()
                result = self._execute(execute, operation)
                spent = Spent(time.monotonic() - started, _num_tokens(operation))
                body = encode(msgspec.structs.replace(result, spent=spent))
            case other:
                raise AssertionError(other)
        self._send(Reply(call.ticket), body)

    def _open(self, command: OpenRun) -> None:
        if command.snapshot is not None:
            self._engine.restore(command.run_id, Path(command.snapshot))
        else:
            self._engine.init_run(
                command.run_id,
                rank=command.lora_rank,
                seed=command.seed,
                initial=_path(command.initial),
                with_optimizer=command.with_optimizer,
                targets=command.targets,
            )

    def _execute(self, context: Execute, operation: Operation) -> Result:
        engine, run_id = self._engine, context.run_id
        match operation:
            case InitTrainer(lora_rank):
                return engine.init_run(
                    run_id,
                    rank=lora_rank,
                    seed=context.seed,
                    initial=_path(context.initial),
                    targets=context.targets,
                )
            case Forward(data, loss_fn, config, top_k, summed, custom):
                return engine.forward(run_id, data, loss_fn, config, top_k, summed=summed, custom=custom)
            case ForwardBackward(data, loss_fn, config, top_k, summed, custom):
                return engine.forward_backward(run_id, data, loss_fn, config, top_k, summed=summed, custom=custom)
            case OptimStep(adam):
                return engine.optim_step(run_id, adam)
            case LoadState(with_optimizer=with_optimizer):
                assert context.read_from is not None
                return engine.load_checkpoint(run_id, Path(context.read_from), with_optimizer=with_optimizer)
            case SaveState(checkpoint_id, name):
                assert context.write_to is not None
                saved = engine.save_trainer_checkpoint(run_id, Path(context.write_to))
                return SaveResult(checkpoint_id, name, CheckpointTarget.TRAINER, *saved)
            case SaveWeightsForSampler(checkpoint_id, name):
                assert context.write_to is not None
                saved = engine.save_sampler_checkpoint(run_id, Path(context.write_to))
                # In memory at once, so that the first sample need not read the files.
                engine.publish(run_id, checkpoint_id)
                return SaveResult(checkpoint_id, name, CheckpointTarget.SAMPLER, *saved)

            case SaveWeightsExternal(checkpoint_id, name, base_model, recipients):
                assert context.write_to is not None
                folder = Path(context.write_to)
                saved = engine.save_external_weights(run_id, folder, base_model)
                if recipients:
                    saved = saved._replace(size_bytes=encrypt_folder(folder, recipients))
                return SaveResult(checkpoint_id, name, CheckpointTarget.EXTERNAL, *saved)

    def _guard(self, ticket: int, act: Callable[[], None]) -> None:
        try:
            act()
        except (BadRequest, NotFound, OperationFailed) as error:
            self._send(ReplyError(ticket, str(error), getattr(error, "error_class", type(error).__name__)))
        except Exception as error:  # The worker's edge: one bad call must not end every run it holds.
            log.exception("call %d failed", ticket)
            self._send(ReplyError(ticket, f"{type(error).__name__}: {error}", type(error).__name__))

    def _send(self, event: Event, body: bytes = b"") -> None:
        self._socket.send_multipart([encode(event), body])


def _num_tokens(operation: Operation) -> int:
    """Tokens that an operation sends through the model."""
    if isinstance(operation, Forward | ForwardBackward):
        return sum(datum.tokens.num_elements for datum in operation.data)
    return 0


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


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
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args()

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _die_with(options.parent_pid)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)

    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(options.address)
    try:
        socket.send_multipart([encode(Loading("loading the base model")), b""])
        tokenizer = ModelTokenizer.load(options.model_dir)
        chat = ChatTemplate.load(options.model_dir, tokenizer)
        config = read_config(options.model_dir)
        engine = Engine.load(
            options.model_dir,
            device=options.device,
            dtype=options.dtype,
            vocabulary=tokenizer,
            compile_grammar=GrammarCompiler(tokenizer, config.vocab_size, list(config.eos_token_ids)),
        )
    except Exception as error:  # Reported to the gateway, which shows it to whoever waits for this model.
        log.exception("cannot load %s", options.model_dir)
        socket.send_multipart([encode(LoadFailed(f"{type(error).__name__}: {error}")), b""])
        socket.close(linger=2000)
        raise SystemExit(1) from error
    info = engine.info
    log.info("loaded %s: %s", options.model_dir, info)
    ready = Ready(
        ModelInfo(info.vocab_size, info.max_position_embeddings, info.num_parameters, str(info.dtype), str(info.device))
    )
    socket.send_multipart([encode(ready), b""])
    Worker(socket, engine, tokenizer, chat).run()


if __name__ == "__main__":
    main()

"""A worker without an engine: it does what control asks of one, with arithmetic that shows every mistake of order."""

import asyncio
import json
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from selfloop.types.blob_ref import local_path
from selfloop.types.digests import check_folder, damaged, seal
from selfloop.types.errors import OperationFailed, WorkerLost
from selfloop.types.operation import (
    Forward,
    ForwardBackward,
    InitTrainer,
    LoadState,
    Operation,
    OptimStep,
    SaveState,
    SaveWeightsForSampler,
)
from selfloop.types.result import InitResult, LoadResult, LossResult, Probe, Result, SaveResult, StepResult
from selfloop.types.sampling import SampleDelta, SampledSequence, SampleRequest, SampleResult, TokenLogprob
from selfloop.types.status import CheckpointTarget
from selfloop.worker.protocol import (
    CancelSample,
    CloseRun,
    Command,
    Execute,
    ModelInfo,
    OpenRun,
    RenderChat,
    RenderedChat,
    Sample,
    Snapshot,
    Tokenize,
    Written,
)

_decoder: "msgspec.msgpack.Decoder[Operation]" = msgspec.msgpack.Decoder(Operation)
_MODULUS = 1_000_003


@dataclass
class FakeState:
    """``weights`` depends on every operation and on their order."""

    weights: int = 1
    gradient: int = 0
    step: int = 0

    def apply(self, operation: Operation) -> Result:
        match operation:
            case InitTrainer(rank):
                self.weights, self.gradient, self.step = rank, 0, 0
                return InitResult(0, rank)
            case Forward(_, loss_fn, config):
                return self._loss(loss_fn, config)
            case ForwardBackward(_, loss_fn, config):
                result = self._loss(loss_fn, config)
                self.gradient = (self.gradient * 3 + int(config["value"])) % _MODULUS
                return result
            case OptimStep():
                self.weights = (self.weights * 31 + self.gradient) % _MODULUS
                self.gradient, self.step = 0, self.step + 1
                return StepResult({"step": float(self.step), "weights": float(self.weights)})
            case _:
                raise AssertionError(operation)

    def _loss(self, loss_fn: str, config: dict[str, float | bool]) -> LossResult:
        if loss_fn == "fails":
            raise OperationFailed("asked to fail", "Asked")
        return LossResult(float(self.weights * 7 + self.gradient), [], {"value": float(config["value"])})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(vars(self)))
        seal(folder)

    @classmethod
    def load(cls, folder: Path) -> "FakeState":
        if not folder.is_dir():
            raise damaged(folder, "the folder is gone")
        check_folder(folder)
        return cls(**json.loads((folder / "state.json").read_text()))


def sampled(request: SampleRequest, salt: int = 0) -> list[SampledSequence]:
    """What a fake worker samples: a letter a token, by seed and place."""
    seed = request.params.seed or 0
    sequences: list[SampledSequence] = []
    for index in range(request.num_samples):
        tokens = [(seed * 31 + index * 7 + i * i + salt * i) % 26 for i in range(request.params.max_tokens)]
        text = "".join(chr(ord("a") + token) for token in tokens)
        sequences.append(SampledSequence(tokens, [-token / 10 for token in tokens], "length", text))
    return sequences


class FakeWorker:
    """Answers calls in order, each after a turn of the event loop, until the test ends it."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = roots
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ready: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.ready.set_result(ModelInfo(1, 1, 1, "float32", "cpu", run_bytes=2**62))
        self.runs: dict[str, FakeState] = {}
        self.executed: list[str] = []
        self.dies_at: int | None = None
        self.full_disk = False
        self.cancelled: list[str] = []
        self.dies_after_parts: int | None = None
        self.salt = 0
        self.writing_turns = 5
        self.num_busy = 0
        self.probe: Probe | None = None
        """What the next saves for samplers say of the trainer's logprobs."""
        self.scores: list[float] | OperationFailed = []
        """The sampler's logprobs of any prompt's tokens but the first."""
        self.scored: list[SampleRequest] = []
        self._writing: asyncio.Task[None] | None = None
        self._begun: asyncio.Future[bytes] | None = None
        self._calls: asyncio.Queue[tuple[Command, bytes, asyncio.Future[bytes]]] = asyncio.Queue()
        self._task = asyncio.create_task(self._serve())

    def call(self, command: Command, payload: bytes = b"") -> "asyncio.Future[bytes]":
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.lost.done():
            future.set_exception(WorkerLost("dead"))
        else:
            self._calls.put_nowait((command, payload, future))
        return future

    async def stream(self, command: Command) -> AsyncGenerator[bytes]:
        """A part a token, its sample's in turn, then the answer."""
        assert isinstance(command, Sample)
        request, sequences = command.request, sampled(command.request, self.salt)
        num_parts = 0
        for i in range(request.params.max_tokens if command.stream else 0):
            for index, s in enumerate(sequences):
                if num_parts == self.dies_after_parts:
                    self.die()
                    raise WorkerLost("killed by the test")
                await asyncio.sleep(0)
                reason = s.stop_reason if i + 1 == len(s.tokens) else None
                num_parts += 1
                yield msgspec.msgpack.encode([SampleDelta(index, [s.tokens[i]], [s.logprobs[i]], s.text[i], reason)])
        if num_parts == self.dies_after_parts:
            self.die()
            raise WorkerLost("killed by the test")
        yield msgspec.msgpack.encode(SampleResult(request.request_id, sequences))

    def die(self) -> None:
        if self.lost.done():
            return
        self.lost.set_result("killed by the test")
        self._task.cancel()
        if self._writing is not None:
            self._writing.cancel()
        while not self._calls.empty():
            self._lose(self._calls.get_nowait()[2])

    async def call_is_done(self) -> None:
        """Every call that was made before this has been answered."""
        await self.call(Tokenize(["a"]))

    async def close(self) -> None:
        tasks = [task for task in (self._task, self._writing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _lose(self, future: "asyncio.Future[bytes]") -> None:
        if not future.done():
            future.set_exception(WorkerLost("killed by the test", begun=future is self._begun))
            future.exception()

    async def _serve(self) -> None:
        while True:
            command, payload, future = await self._calls.get()
            try:
                await asyncio.sleep(0)
                if isinstance(command, Execute):
                    self._begun = future
                if isinstance(command, Snapshot) and command.background and not self.full_disk:
                    self._begin_writing(command, future)
                    continue
                if self.dies_at is not None and len(self.executed) >= self.dies_at:
                    asyncio.get_running_loop().call_soon(self.die)
                    await asyncio.sleep(3600)
                body = self._perform(command, payload)
            except asyncio.CancelledError:
                self._lose(future)
                raise
            except OperationFailed as error:
                future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(body)

    def _begin_writing(self, command: Snapshot, future: "asyncio.Future[bytes]") -> None:
        """A copy of the state is written while the calls behind go on."""
        if self._writing is not None and not self._writing.done():
            self.num_busy += 1
            future.set_exception(OperationFailed("another is being written", "Busy"))
            return
        if command.run_id not in self.runs:
            future.set_exception(OperationFailed("no such run", "NotFound"))
            return
        state = FakeState(**vars(self.runs[command.run_id]))

        async def write() -> None:
            try:
                for _ in range(self.writing_turns):
                    await asyncio.sleep(0)
            except asyncio.CancelledError:
                self._lose(future)
                raise
            state.save(local_path(command.write_to, self.roots))
            future.set_result(msgspec.msgpack.encode(Written(0.0, 0.0)))

        self._writing = asyncio.create_task(write())

    def _perform(self, command: Command, payload: bytes) -> bytes:
        match command:
            case OpenRun(run_id, lora_rank, _seed, initial, snapshot):
                start, fresh = snapshot or initial, FakeState(weights=lora_rank)
                self.runs[run_id] = FakeState.load(local_path(start, self.roots)) if start else fresh
                return b""
            case CloseRun(run_id):
                del self.runs[run_id]
                return b""
            case Snapshot() if self.full_disk:
                raise OperationFailed("no space left", "OSError")
            case Snapshot(run_id, write_to):
                self.runs[run_id].save(local_path(write_to, self.roots))
                return msgspec.msgpack.encode(Written(0.0, 0.0))
            case Execute(run_id):
                self.executed.append(run_id)
                return msgspec.msgpack.encode(self._execute(command, _decoder.decode(payload)))
            case Sample(request):
                self.scored.append(request)
                if isinstance(self.scores, OperationFailed):
                    raise self.scores
                places = zip(request.prompt[1:], self.scores, strict=True)
                scored = [None, *([TokenLogprob(token, logprob, 1)] for token, logprob in places)]
                return msgspec.msgpack.encode(SampleResult(request.request_id, sampled(request), scored))
            case CancelSample(request_id):
                self.cancelled.append(request_id)
                return b""
            case Tokenize(texts, add_special_tokens):
                if "" in texts:
                    raise OperationFailed("prompt: at least one character", "BadRequest")
                first = [0] if add_special_tokens else []
                return msgspec.msgpack.encode([first + list(text.encode()) for text in texts])
            case RenderChat(messages):
                return msgspec.msgpack.encode(RenderedChat(list(messages)))
            case other:
                raise AssertionError(other)

    def _execute(self, command: Execute, operation: Operation) -> Result:
        state = self.runs[command.run_id]
        match operation:
            case SaveState(checkpoint_id, name) | SaveWeightsForSampler(checkpoint_id, name):
                assert command.write_to is not None
                state.save(local_path(command.write_to, self.roots))
                is_trainer = isinstance(operation, SaveState)
                target = CheckpointTarget.TRAINER if is_trainer else CheckpointTarget.SAMPLER
                probe = None if is_trainer else self.probe
                return SaveResult(checkpoint_id, name, target, state.step, 8, 32.0, 1, probe)
            case LoadState(with_optimizer=with_optimizer):
                assert command.read_from is not None
                loaded = FakeState.load(local_path(command.read_from, self.roots))
                state.weights, state.gradient = loaded.weights, 0
                state.step = loaded.step if with_optimizer else 0
                return LoadResult(state.step, 8)
            case _:
                return state.apply(operation)


@dataclass
class FakeLifecycle:
    """Capacity that is always granted; a worker that died is replaced."""

    roots: Mapping[str, Path] = field(default_factory=dict[str, Path])
    workers: list[FakeWorker] = field(default_factory=list)
    failure: OperationFailed | None = None
    dies_at: int | None = None
    always_dies_at: int | None = None

    sample_deaths: list[int] = field(default_factory=list)
    """After how many parts of a stream each worker dies, in turn."""
    salts: list[int] = field(default_factory=list)
    """Makes each worker, in turn, sample something else."""

    async def wake(self, _id: str) -> FakeWorker:
        if self.failure is not None:
            raise self.failure
        if not self.workers or self.workers[-1].lost.done():
            worker = FakeWorker(self.roots)
            worker.dies_after_parts = self.sample_deaths.pop(0) if self.sample_deaths else None
            worker.salt = self.salts.pop(0) if self.salts else 0
            worker.dies_at = self.dies_at if self.always_dies_at is None else self.always_dies_at
            self.dies_at = None
            self.workers.append(worker)
        return self.workers[-1]

    @contextmanager
    def using(self, _id: str) -> Generator[None]:
        yield

    def touch(self, _id: str) -> None: ...

    def key_of(self, _id: str) -> str | None:
        return None

    def describe(self, _id: str) -> str:
        return "loading"

    def status(self, _id: str) -> str:
        return "LOADING_MODEL"

    async def close(self) -> None:
        for worker in self.workers:
            await worker.close()

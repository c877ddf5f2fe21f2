"""The queues of runs in the worker: who shares a pass, who waits, and who is to blame."""

import shutil
import sys
from pathlib import Path

import msgspec
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.types.blob_ref import DATA, BlobRef
from selfloop.types.operation import AdamParams, ForwardBackward, OptimStep, kind_of
from selfloop.types.result import LossResult
from selfloop.types.settings import EngineLimits
from selfloop.worker.protocol import Call, CloseRun, Event, Execute, OpenRun, Reply, ReplyError, Snapshot
from selfloop.worker.serving.replies import Replies
from selfloop.worker.serving.staging import SharedDisk, Staging
from selfloop.worker.serving.training import TrainingQueue


class Reported(Replies):
    """Keeps what would be sent."""

    def __init__(self, begun_path: Path) -> None:
        super().__init__(None, begun_path)
        self.events: list[Event | int] = []
        """What was sent, and in between the ticket of each operation that began."""
        self.bodies: dict[int, bytes] = {}

    def send(self, event: Event, body: bytes = b"") -> None:
        self.events.append(event)
        if isinstance(event, Reply):
            self.bodies[event.ticket] = body

    def begin(self, ticket: int) -> None:
        super().begin(ticket)
        self.events.append(ticket)

    @property
    def answered(self) -> list[int]:
        return [event.ticket for event in self.events if isinstance(event, Reply | ReplyError)]


class Queue(TrainingQueue):
    """The queue with calls made simple: tickets count from 1."""

    def __init__(self, engine: Engine, reported: Reported, staging: Staging | None = None) -> None:
        super().__init__(engine, staging or SharedDisk({}), reported)
        self.reported = reported
        self._num = 0

    def order(self, command: OpenRun | Snapshot) -> None:
        self._num += 1
        self.take(Call(self._num, command), command, b"")

    def ask(self, run_id: str, operation, *, alone: bool = False) -> int:
        self._num += 1
        execute = Execute(run_id, 0, alone=alone)
        self.take(Call(self._num, execute), execute, msgspec.msgpack.encode(operation))
        return self._num


def loss(num_tokens: int, num_sequences: int = 1) -> ForwardBackward:
    data = [tiny_models.next_token_datum(tiny_models.random_ids(num_tokens + 1, i)) for i in range(num_sequences)]
    return ForwardBackward(data, "cross_entropy", {})


STEP = OptimStep(AdamParams(learning_rate=1e-3))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama-tied", tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(model_dir: Path) -> Engine:
    engine = Engine.load(model_dir, device="cpu", dtype="float32", limits=EngineLimits(train_token_budget=32))
    for name in "abcd":
        engine.init_run(name, rank=2, seed=1)
    return engine


@pytest.fixture
def passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens of each micro-batch of each pass."""
    made: list[list[int]] = []
    advance = engine.advance

    def noted(requests):
        made.append([request.job.num_next_tokens for request in requests])
        advance(requests)

    monkeypatch.setattr(engine, "advance", noted)
    return made


@pytest.fixture
def queue(engine: Engine, tmp_path: Path) -> Queue:
    return Queue(engine, Reported(tmp_path / "begun"))


def finish(queue: Queue) -> None:
    for _ in range(100):
        if not queue.has_work:
            return
        queue.step()
    raise AssertionError("it does not end")


def test_what_is_ready_shares_a_pass_and_each_gets_its_own_result(queue: Queue, passes: list[list[int]]):
    tickets = [queue.ask(run, loss(num)) for run, num in (("a", 10), ("b", 12), ("c", 9), ("d", 20))]
    steps = [queue.ask(run, STEP) for run in "abcd"]
    finish(queue)
    assert sorted(map(sum, passes)) == [20, 31]
    results = [msgspec.msgpack.decode(queue.reported.bodies[ticket], type=LossResult) for ticket in tickets]
    assert [len(result.logprobs[0].values()) for result in results] == [10, 12, 9, 20]
    assert [result.spent.num_tokens for result in results] == [10, 12, 9, 20]
    assert set(queue.reported.answered) == {*tickets, *steps}
    assert not any(isinstance(event, ReplyError) for event in queue.reported.events)


def test_a_small_operation_overtakes_a_large_one(queue: Queue, passes: list[list[int]]):
    large = queue.ask("a", loss(30, num_sequences=12))
    queue.step()
    small = queue.ask("b", loss(10))
    finish(queue)
    assert queue.reported.answered == [small, large]
    # The small one waited for one pass, or for two if it was level with the large one.
    assert [10] in passes[1:3]
    assert len(passes) == 13


def test_alone_means_alone_from_begin_to_end(queue: Queue, passes: list[list[int]]):
    alone = queue.ask("a", loss(10, num_sequences=7), alone=True)
    others = [queue.ask(run, loss(5)) for run in "bc"]
    finish(queue)
    begun = [event for event in queue.reported.events if isinstance(event, int)]
    between = queue.reported.events[queue.reported.events.index(alone) : queue.reported.events.index(Reply(alone))]
    assert between == [alone]
    assert sorted(begun) == [alone, *others]
    assert [30] in passes
    assert [5, 5] in passes


def test_one_that_breaks_the_pass_fails_alone(queue: Queue, engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """An error of the whole pass, as of memory: the others are computed all the same."""
    advance = engine.advance

    def breaks(requests):
        if any(request.job.run is engine._runs["b"] for request in requests):
            raise MemoryError("not enough")
        advance(requests)

    monkeypatch.setattr(engine, "advance", breaks)
    tickets = {run: queue.ask(run, loss(8)) for run in "abc"}
    finish(queue)
    errors = [event for event in queue.reported.events if isinstance(event, ReplyError)]
    assert [(error.ticket, error.error_class) for error in errors] == [(tickets["b"], "MemoryError")]
    assert sorted(queue.reported.bodies) == [tickets["a"], tickets["c"]]
    assert engine._runs["b"].accumulated is None


def test_refusals_come_at_once_and_closed_runs_are_forgotten(queue: Queue, engine: Engine):
    bad = queue.ask("a", ForwardBackward(loss(4).data, "nonsense", {}))
    queue.ask("nobody", loss(4))
    good = queue.ask("b", loss(4))
    finish(queue)
    errors = [event for event in queue.reported.events if isinstance(event, ReplyError)]
    assert [error.error_class for error in errors] == ["BadRequest", "NotFound"]
    assert errors[0].ticket == bad
    assert list(queue.reported.bodies) == [good]
    close = CloseRun("b")
    queue.take(Call(99, close), close, b"")
    finish(queue)
    assert not engine.has_run("b")
    assert kind_of(STEP) == "optim_step"


def test_it_waits_for_company_only_where_some_is_likely(queue: Queue):
    queue.ask("a", loss(10))
    assert queue.patience_s() == 0.0, "nobody else was here"
    queue.ask("b", loss(10))
    finish(queue)
    queue._last_pass_s = 10.0
    queue.ask("a", loss(10))
    assert 0 < queue.patience_s() < 0.051, "b is likely to come"
    queue.ask("b", loss(10))
    assert queue.patience_s() == 0.0, "all are here"
    queue.ask("b", STEP)
    finish(queue)
    queue.ask("a", STEP)
    assert queue.patience_s() == 0.0, "a step needs no company"


class OtherMachine:
    """A staging whose disk is not the gateway's: what it works with is copied from and to a store."""

    def __init__(self, store: Path, scratch: Path) -> None:
        self._store = SharedDisk({DATA: store})
        self._scratch = SharedDisk({DATA: scratch})

    def to_read(self, ref: BlobRef) -> Path:
        return Path(shutil.copytree(self._store.to_read(ref), self._scratch.to_read(ref), dirs_exist_ok=True))

    def to_write(self, ref: BlobRef) -> Path:
        folder = self._scratch.to_write(ref)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def written(self, ref: BlobRef) -> None:
        shutil.move(self._scratch.to_write(ref), self._store.to_write(ref))


@pytest.mark.parametrize("background", [False, True])
def test_a_worker_on_another_machine_writes_and_reads_by_reference(engine: Engine, tmp_path: Path, background: bool):
    """A snapshot, and a run that is opened from it where nothing of the first is."""
    queue = Queue(engine, Reported(tmp_path / "begun"), OtherMachine(tmp_path / "store", tmp_path / "scratch"))
    queue.ask("a", loss(10))
    queue.ask("a", STEP)
    ref = BlobRef(DATA, "snapshots/a/0-2")
    (tmp_path / "store" / ref.key).parent.mkdir(parents=True)
    queue.order(Snapshot("a", ref, background))
    finish(queue)
    while queue.is_writing:
        queue.report_snapshots()
    assert (tmp_path / "store" / ref.key).is_dir()
    assert not (tmp_path / "scratch" / ref.key).exists()
    queue.order(OpenRun("again", 2, 0, None, ref))
    finish(queue)
    assert queue.reported.answered == [1, 2, 3, 4]
    assert not any(isinstance(event, ReplyError) for event in queue.reported.events)
    assert torch.equal(engine._runs["again"].theta_P, engine._runs["a"].theta_P)

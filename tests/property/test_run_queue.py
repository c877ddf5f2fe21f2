"""A run's queue against a list that is sorted anew for each question."""

from hypothesis import given
from hypothesis import strategies as st

from fake_house import new_run
from selfloop.control.queue.run_queue import Queued, RunQueue
from selfloop.storage.db.tables import OperationRow

events = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(1, 9)),
        st.tuples(st.just("remove"), st.integers(1, 9)),
        st.tuples(st.just("attach"), st.just(0)),
        st.tuples(st.just("send"), st.integers(1, 3)),
        st.tuples(st.just("return"), st.just(0)),
        st.tuples(st.just("give up"), st.just(0)),
    ),
    max_size=40,
)


def row(epoch: int, seq: int) -> OperationRow:
    return OperationRow(
        run_id="run",
        id=f"{epoch}-{seq}",
        epoch=epoch,
        seq=seq,
        kind="optim_step",
        fingerprint="",
        state="queued",
        created_at=0.0,
        payload=b"",
    )


@given(plan=events)
def test_nothing_is_sent_before_what_it_waits_for(plan: list[tuple[str, int]]) -> None:
    run = new_run(0.0)
    queue = RunQueue(run)
    held: set[tuple[int, int]] = set()
    taken: set[tuple[int, int]] = set()
    sent: list[Queued] = []
    for event, number in plan:
        match event:
            case "arrive":
                place = (run.epoch, number)
                if place in taken or number < run.next_seq:
                    continue
                taken.add(place)
                held.add(place)
                if number == run.next_seq:
                    run.next_seq = next(seq for seq in range(number + 1, 99) if (run.epoch, seq) not in held)
                queue.push(row(*place))
            case "remove":
                place = (run.epoch, number)
                assert queue.remove(f"{run.epoch}-{number}") == (place in held)
                held.discard(place)
            case "attach":
                run.epoch, run.next_seq = run.epoch + 1, 1
            case "send":
                while number and queue.ready is not None:
                    sent.append(queue.pop())
                    assert sent[-1].position == min(held)
                    held.discard(sent[-1].position)
                    number -= 1
            case "return":
                queue.put_back(sent)
                held |= {queued.position for queued in sent}
                sent = []
            case _:
                if queue.missing_seq is not None:
                    run.next_seq = max(held)[1] + 1
                    assert [queued.position for queued in queue.clear()] == sorted(held)
                    held.clear()
        queue.check_integrity()
        assert {queued.position for queued in queue} == held
        first = min(held, default=None)
        is_ready = first is not None and (first[0] < run.epoch or first[1] < run.next_seq)
        assert (queue.ready is not None) == is_ready
        assert (queue.missing_seq is None) == (first is None or is_ready)

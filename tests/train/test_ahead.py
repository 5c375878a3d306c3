"""The next epoch is begun while the last steps of one are trained: when, from what, and what becomes of errors."""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator

import pytest

from train.ahead import LEAD_S, TURNS, EpochBatches, ReadAhead, executions_of

WAIT_S = 10.0


class Data:
    """Stands for a trainer's data sets: each epoch that is read from one is noted, and its batches counted out."""

    def __init__(self, batches: int, fails_at: int | None = None) -> None:
        self.batches, self.fails_at = batches, fails_at
        self.asked: list[str] = []
        self.begun: list[str] = []
        self.changed = threading.Condition()

    def shard_of(self, name: str) -> str:
        with self.changed:
            self.asked.append(name)
            self.changed.notify_all()
        return name

    def read(self, name: str) -> Iterator[str]:
        with self.changed:
            self.begun.append(name)
            number = len(self.begun) - 1
            self.changed.notify_all()
        if number == self.fails_at:
            raise OSError(f"epoch {number} cannot be read")
        for batch in range(self.batches):
            yield f"{name} {number}.{batch}"

    def wait_for(self, epochs: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= epochs, WAIT_S)


class Clock:
    """Goes on by as much as a step takes, and between two readings, before and after a batch, by what it waits for."""

    def __init__(self, waits: Iterable[float] = itertools.repeat(0.0)) -> None:
        self.now_s = 0.0
        self.waits = itertools.chain.from_iterable((0.0, wait_s) for wait_s in waits)

    def __call__(self) -> float:
        self.now_s += next(self.waits)
        return self.now_s

    def go_on(self, seconds: float) -> None:
        self.now_s += seconds


def epochs_of(
    data: Data,
    clock: Clock | None = None,
    *,
    first_epoch: int = 0,
    epochs: int = 2,
    together: int = 1,
    ahead: int = 2,
) -> EpochBatches[str]:
    executions = executions_of(range(first_epoch, epochs), together, lambda _: False)
    return EpochBatches(data.shard_of, data.read, executions=executions, ahead=ahead, clock=clock or Clock())


@pytest.mark.parametrize("first", [0, 3])
def test_two_data_sets_take_turns_and_every_batch_comes_once_and_in_order(first):
    data = Data(batches=4)
    epochs = epochs_of(data, first_epoch=first, epochs=first + 3)
    taken = [list(epochs.of(epoch, 4)) for epoch in range(first, first + 3)]
    even, odd = TURNS
    assert taken == [
        [f"{even} 0.{batch}" for batch in range(4)],
        [f"{odd} 1.{batch}" for batch in range(4)],
        [f"{even} 2.{batch}" for batch in range(4)],
    ]
    assert data.asked == [even, odd]


def test_an_epoch_that_is_begun_is_read_before_anybody_asks_for_its_batches():
    data = Data(batches=1)
    epochs = epochs_of(data)
    assert data.begun == []
    epochs.begin(0)
    epochs.begin(0)
    data.wait_for(1)
    assert list(epochs.of(0, 1)) == [f"{TURNS[0]} 0.0"]


@pytest.mark.parametrize(
    ("steps", "step_s", "begun"),
    [
        (100, LEAD_S / 8, 93),  # eight steps of a long epoch are the lead
        (100, LEAD_S / 1000, 76),  # the last quarter of an epoch that is shorter than the lead
        (100, LEAD_S * 2, 100),  # the last step where one takes longer than the lead
        (3, LEAD_S / 10, 3),
        (1, LEAD_S / 10, 1),
    ],
)
def test_the_next_epoch_is_begun_when_its_lead_is_left_and_not_before(steps, step_s, begun):
    data, clock = Data(batches=steps), Clock()
    epochs = epochs_of(data, clock)
    begun_at = None
    for step, _ in enumerate(epochs.of(0, steps), start=1):
        if begun_at is None and epochs.begun == 1:
            begun_at = step
        clock.go_on(step_s)
    assert begun_at == begun
    data.wait_for(2)


@pytest.mark.parametrize(("wait_s", "begun"), [(0.001, 76), (0.01, 100)])
def test_where_ranks_wait_for_batches_the_next_epoch_is_begun_with_the_last_one_only(wait_s, begun):
    clock = Clock(itertools.repeat(wait_s))
    epochs = epochs_of(Data(batches=100), clock)
    taken = []
    for step, _ in enumerate(epochs.of(0, 100), start=1):
        clock.go_on(0.1)
        taken += [step] if epochs.begun == 1 else []
    assert taken[0] == begun


def test_what_ranks_waited_at_an_epochs_start_does_not_count():
    clock = Clock(itertools.chain([5.0, 2.0], itertools.repeat(0.0)))
    epochs = epochs_of(Data(batches=100), clock)
    for step, _ in enumerate(epochs.of(0, 100), start=1):
        clock.go_on(0.1)
        assert (epochs.begun == 1) == (step >= 76)


def test_the_other_data_set_is_opened_in_the_middle_of_the_first_epoch():
    data = Data(batches=10)
    epochs = epochs_of(data)
    batches = epochs.of(0, 10, ahead=False)
    for _ in range(4):
        next(batches)
    assert data.asked == [TURNS[0]]
    next(batches)
    with data.changed:
        assert data.changed.wait_for(lambda: data.asked == list(TURNS), WAIT_S)
    assert len(data.begun) == 1


def test_an_epoch_with_fewer_steps_than_thought_begins_the_next_at_its_end():
    data = Data(batches=1)
    epochs = epochs_of(data)
    assert len(list(epochs.of(0, 50))) == 1
    data.wait_for(2)
    assert len(list(epochs.of(1, 50))) == 1


def test_an_epoch_after_which_something_else_comes_first_begins_no_other():
    data = Data(batches=3)
    epochs = epochs_of(data)
    list(epochs.of(0, 3, ahead=False))
    assert epochs.begun is None
    epochs.begin(1)
    data.wait_for(2)


def test_no_epoch_is_begun_after_the_last():
    data = Data(batches=5)
    epochs = epochs_of(data, epochs=1)
    list(epochs.of(0, 5))
    epochs.begin(1)
    assert epochs.begun is None
    assert data.begun == [TURNS[0]]


def test_what_an_epoch_is_read_from_is_known_once_it_is_begun():
    data = Data(batches=2)
    epochs = epochs_of(data, epochs=4)
    assert epochs.shard(1) is None
    for epoch in range(3):
        list(epochs.of(epoch, 2))
    assert [epochs.shard(epoch) for epoch in range(4)] == [*TURNS, *TURNS]


def test_an_error_of_reading_ahead_comes_out_in_the_epoch_that_it_belongs_to():
    data = Data(batches=3, fails_at=1)
    epochs = epochs_of(data)
    assert len(list(epochs.of(0, 3))) == 3
    with pytest.raises(OSError, match="epoch 1 cannot be read"):
        next(epochs.of(1, 3))


def test_epochs_out_of_turn_are_refused():
    data = Data(batches=1)
    epochs = epochs_of(data, epochs=3)
    epochs.begin(0)
    with pytest.raises(ValueError, match="one after the other, found 2"):
        next(epochs.of(1, 1))


@pytest.mark.parametrize(
    ("epochs", "most", "scored", "expected"),
    [
        (range(5), 1, (), [(0,), (1,), (2,), (3,), (4,)]),
        (range(5), 2, (), [(0,), (1, 2), (3, 4)]),
        (range(10), 9, (), [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]),
        (range(3, 9), 100, (), [(3, 4, 5, 6, 7, 8)]),
        (range(7), 3, (1, 6), [(0, 1), (2, 3), (4, 5, 6)]),
        (range(4), 9, range(4), [(0,), (1,), (2,), (3,)]),
        (range(4, 4), 9, (), []),
    ],
)
def test_epochs_are_read_on_end_up_to_the_next_scoring_and_no_more_than_so_many(epochs, most, scored, expected):
    assert [tuple(found) for found in executions_of(epochs, most, lambda epoch: epoch in scored)] == expected


def test_epochs_of_one_execution_are_read_on_end_and_the_next_execution_from_the_other_data_set():
    data = Data(batches=9)
    epochs = epochs_of(data, first_epoch=2, epochs=7, together=3)
    taken = [list(epochs.of(epoch, 4 if epoch < 4 else 3)) for epoch in range(2, 7)]
    even, odd = TURNS
    # Of the last epoch of an execution all is taken that there is.
    assert taken[:2] == [[f"{even} 0.{batch}" for batch in range(4)], [f"{even} 0.{batch}" for batch in range(4, 9)]]
    assert taken[2:] == [[f"{odd} 1.{batch}" for batch in range(first, first + 3)] for first in (0, 3, 6)]
    assert data.begun == [even, odd]
    assert [epochs.shard(epoch) for epoch in range(2, 8)] == [even, even, odd, odd, odd, None]


def test_the_next_execution_is_begun_in_the_last_epoch_of_one_only():
    data, clock = Data(batches=300), Clock()
    epochs = epochs_of(data, clock, epochs=6, together=3)
    seen = {}
    for epoch in range(3):
        for step, _ in enumerate(epochs.of(epoch, 100), start=1):
            if epochs.begun is not None:
                seen.setdefault(epochs.begun, (epoch, step))
            clock.go_on(LEAD_S / 40)
        epochs.begin(epoch + 1)  # as after each epoch of a run
    assert seen == {3: (2, 61)}  # its lead is 40 steps, of an execution of 300
    data.wait_for(2)


def test_an_epoch_that_is_too_short_for_its_execution_is_an_error_and_no_epoch_of_fewer_steps():
    data = Data(batches=5)
    epochs = epochs_of(data, epochs=2, together=2)
    assert len(list(epochs.of(0, 3))) == 3
    with pytest.raises(RuntimeError, match=r"expected 3 batches of epoch 2, since epochs 1 to 2 .* found 2"):
        list(epochs.of(1, 3))
    epochs = epochs_of(Data(batches=5), epochs=2, together=2)
    with pytest.raises(RuntimeError, match=r"expected 6 batches of epoch 1, since epochs 1 to 2 .* found 5"):
        list(epochs.of(0, 6))


def test_an_epoch_within_an_execution_is_not_skipped():
    epochs = epochs_of(Data(batches=9), epochs=3, together=3)
    list(epochs.of(0, 3))
    with pytest.raises(ValueError, match="one after the other, found 3 asked for where 2 is due"):
        next(epochs.of(2, 3))


def test_what_is_left_of_an_execution_is_not_skipped_for_the_next():
    data = Data(batches=9)
    epochs = epochs_of(data, epochs=4, together=2)
    list(epochs.of(0, 3))
    with pytest.raises(ValueError, match="found 3 asked for where 2 is due"):
        next(epochs.of(2, 3))
    assert data.begun == [TURNS[0]]


class Items:
    """Hands out numbers and notes how many; it can fail, and tells when it is let go."""

    def __init__(self, count: int, fails: bool = False) -> None:
        self.count, self.fails = count, fails
        self.made = 0
        self.changed = threading.Condition()
        self.ended = threading.Event()

    def __call__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                with self.changed:
                    self.made += 1
                    self.changed.notify_all()
                yield number
            if self.fails:
                raise OSError("the last one cannot be read")
        finally:
            self.ended.set()

    def wait_for(self, made: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.made >= made, WAIT_S)


@pytest.mark.parametrize("ahead", [1, 3])
def test_so_many_items_are_made_ready_before_they_are_asked_for_and_no_more(ahead):
    items = Items(20)
    taken = iter(ReadAhead(items, ahead))
    for number in range(10):
        items.wait_for(number + ahead)
        time.sleep(0.005)  # for one that would be too many
        assert items.made == number + ahead
        assert next(taken) == number
    assert list(taken) == list(range(10, 20))
    assert items.ended.is_set()


def test_an_error_comes_out_after_what_was_read_before_it():
    taken = iter(ReadAhead(Items(2, fails=True), ahead=5))
    assert [next(taken), next(taken)] == [0, 1]
    with pytest.raises(OSError, match="the last one cannot be read"):
        next(taken)


def test_what_nobody_takes_any_more_is_let_go_and_not_read_to_its_end():
    items = Items(1000)
    for number in ReadAhead(items, ahead=2):
        if number == 3:
            break
    assert items.ended.wait(WAIT_S)
    assert items.made <= 6


def test_who_asks_for_more_after_the_end_gets_nothing_and_does_not_wait():
    items = ReadAhead(Items(3), ahead=1)
    assert list(items) == [0, 1, 2]
    assert list(items) == []


def test_what_is_read_and_not_taken_is_thrown_away():
    items = Items(1000)
    ahead = ReadAhead(items, ahead=3)
    items.wait_for(3)
    ahead.close()
    assert items.ended.wait(WAIT_S)
    assert list(ahead) == []


@pytest.mark.parametrize("taken", [0, 2, 3])
def test_an_execution_that_is_begun_or_in_the_midst_of_an_epoch_or_between_two_is_let_go(taken):
    items = Items(1000)
    epochs = EpochBatches(lambda name: name, lambda _: items(), executions=[range(2)], ahead=2)
    epochs.begin(0)
    items.wait_for(2)
    batches = epochs.of(0, 3)
    for number in range(taken):
        assert next(batches) == number
    if taken == 3:
        assert list(batches) == []  # epoch 1 is still to come
    epochs.close()
    assert items.ended.wait(WAIT_S)
    assert items.made <= 6

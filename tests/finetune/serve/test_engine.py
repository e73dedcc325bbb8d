"""The engine on a decoder whose replies are scripted: nothing here is computed, and every order is exact."""

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from scripted_decoder import ScriptedDecoder, scripted_model

from finetune.batches.image_request import ImageRequest
from finetune.errors import UserError
from finetune.replies.sampling import Sampling
from finetune.serve.asked import Asked, ChoiceToken, Ended, EngineClosed, QueueFull, Refused, Usage
from finetune.serve.batch_bounds import BatchBounds
from finetune.serve.engine import Engine
from qwenvl import ImageAccess, QwenVLConfig

STOP = 5
SHORT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def words(row: Any) -> list[int]:
    """The reply to a prompt is as long as its last token says: the tokens from its first one on."""
    return [row.ids[0] + number for number in range(row.ids[-1])]


class Taker:
    """Takes the events of a request."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()

    def __call__(self, event: Any) -> None:
        self.events.put(event)

    def next(self) -> Any:
        return self.events.get(timeout=20)

    def all(self) -> tuple[dict[int, list[int | None]], Any]:
        """The tokens of each reply, and the last event."""
        replies: dict[int, list[int | None]] = {}
        while isinstance(event := self.next(), ChoiceToken):
            replies.setdefault(event.choice, []).append(event.token.id)
        return replies, event

    def ids(self) -> list[int | None]:
        """The tokens of the one reply, which ends as it should."""
        replies, last = self.all()
        assert isinstance(last, Ended), last
        assert list(replies) == [0]
        return replies[0]


class House:
    """An engine, its decoder, and ways to ask it."""

    def __init__(self, processor: Any, config: Any, *, held: bool = False, **engine: Any) -> None:
        self.decoder = ScriptedDecoder(words, STOP, 1000, context=64, held=held)
        self.model = scripted_model(self.decoder, processor, config)
        self.engine = Engine(self.model, **engine)
        self.tickets: list[Any] = []

    def ask(self, *ids: int, most: int = 10, **asked: Any) -> Taker:
        taker = Taker()
        self.tickets.append(self.engine.submit(Asked(ids, most, (STOP,), **asked), taker))
        return taker

    def settle(self) -> None:
        """Wait until the engine has no replies any more."""
        end = time.monotonic() + 20
        while self.engine.state.rows or self.engine.state.waiting:
            assert time.monotonic() < end
            time.sleep(0.001)


@pytest.fixture
def open_house(tiny_processor, tiny_folder) -> Iterator[Any]:
    houses: list[House] = []

    def opened(**options: Any) -> House:
        houses.append(House(tiny_processor, QwenVLConfig.from_pretrained(tiny_folder), **options))
        return houses[-1]

    yield opened
    for house in houses:
        if house.decoder._permits is not None:
            house.decoder.permit(1000)
        house.engine.close(0)


def picture(shade: int) -> ImageRequest:
    return ImageRequest(Image.new("RGB", (8, 8), (shade, 0, 0)), ImageAccess(), "image")


def test_replies_and_usage(open_house):
    house = open_house()
    takers = [house.ask(100 * n, 1, n + 2) for n in range(1, 5)]
    for n, taker in enumerate(takers, start=1):
        replies, last = taker.all()
        assert replies == {0: [100 * n + k for k in range(n + 2)] + [None]}
        assert last == Ended(Usage(prompt=3, completion=n + 2, cached=0))
    assert house.decoder.live == []
    assert house.engine.state.reply_tokens == 3 + 4 + 5 + 6


def test_what_was_known_of_prompts_is_counted(open_house):
    house = open_house()
    known = []
    for ids in ((1, 2, 3), (1, 2, 3), (4, 5, 6)):
        _, last = house.ask(*ids).all()
        known.append(last.usage.cached)
    assert known == [0, 3, 0]
    assert (house.engine.state.prompt_tokens, house.engine.state.cached_tokens) == (9, 3)


def test_a_reply_ends_at_its_most_tokens(open_house):
    taker = open_house().ask(100, 8, most=3)
    tokens = [taker.next() for _ in range(3)]
    assert [event.token.finish for event in tokens] == [None, None, "length"]
    assert taker.next() == Ended(Usage(2, 3, 0))


def test_a_request_joins_while_others_run(open_house):
    house = open_house(held=True)
    first = house.ask(100, 6)
    first.next()
    house.decoder.permit(2)
    for _ in range(2):
        first.next()
    second = house.ask(200, 2)
    house.decoder.permit(100)
    assert second.ids() == [200, 201, None]
    assert first.ids() == [103, 104, 105, None]
    assert house.decoder.steps[:2] == [1, 1]
    assert max(house.decoder.steps) == 2


def test_running_replies_wait_for_one_prefill_at_a_time(open_house):
    house = open_house(held=True, bounds=BatchBounds(prefill_tokens=5))
    order: list[str] = []
    house.decoder.before_join = lambda rows: order.append(f"join {sum(len(row.ids) for row in rows)}")
    house.decoder.before_step = lambda numbers: order.append("step")
    first = house.ask(100, 9)
    first.next()
    others = [house.ask(*[200] * length, 1) for length in (2, 1, 8, 3)]
    house.decoder.permit(100)
    for taker in (first, *others):
        taker.ids()
    assert order[0] == "join 2"
    # 3 + 2 tokens together, then the long one by itself, then the last.
    joins = [index for index, what in enumerate(order) if what.startswith("join")][1:]
    assert [order[index] for index in joins] == ["join 5", "join 9", "join 4"]
    assert all("step" in order[one:other] for one, other in itertools.pairwise(joins))


def test_a_cancelled_request_leaves_before_the_next_step(open_house):
    house = open_house(held=True)
    gone, stays = house.ask(100, 9), house.ask(200, 3)
    gone.next(), stays.next()
    house.tickets[0].cancel()
    house.decoder.permit(1)  # the one that waits already
    stays.next()
    house.decoder.permit(100)
    assert stays.ids() == [202, None]
    assert house.decoder.steps[1:] == [1] * (len(house.decoder.steps) - 1)
    assert [event.token.id for event in list(gone.events.queue)] in ([], [101])


def test_a_request_is_cancelled_while_it_waits(open_house):
    house = open_house(held=True, bounds=BatchBounds(rows=1))
    first, waits = house.ask(100, 3), house.ask(200, 3)
    first.next()
    house.tickets[1].cancel()
    house.decoder.permit(100)
    first.ids()
    house.settle()
    assert len(house.decoder.joined) == 1
    assert waits.events.empty()


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits(open_house):
    house = open_house(held=True, bounds=BatchBounds(rows=2))
    soon = time.monotonic() + 0.05
    runs, other, waits = house.ask(100, 9, deadline=soon), house.ask(300, 2), house.ask(200, 9, deadline=soon)
    runs.next(), other.next()
    while time.monotonic() < soon:
        time.sleep(0.01)
    house.decoder.permit(100)
    for taker in (runs, waits):
        assert taker.all()[1].cause == "timeout"
    assert other.ids() == [301, None]
    assert house.decoder.live == []


def test_a_deadline_passes_where_nothing_runs(open_house, monkeypatch):
    house = open_house()
    release = threading.Event()
    monkeypatch.setattr("finetune.serve.picture_reading.read_pixels", lambda *args: release.wait(20))
    taker = house.ask(1, 2, images=[picture(1)], deadline=time.monotonic() + 0.05)
    assert taker.next().cause == "timeout"
    release.set()


def test_a_full_queue_takes_no_more(open_house):
    house = open_house(held=True, max_queue=2, bounds=BatchBounds(rows=1))
    runs = house.ask(100, 2)
    runs.next()
    waiting = [house.ask(200, 2), house.ask(300, 2)]
    assert house.engine.is_full
    with pytest.raises(QueueFull):
        house.ask(400, 2)
    house.decoder.permit(100)
    assert [taker.ids() for taker in (runs, *waiting)] == [[101, None], [200, 201, None], [300, 301, None]]
    assert not house.engine.is_full


@pytest.mark.parametrize("at", [0, 2])
def test_a_row_without_numbers_ends_alone(open_house, at):
    """The others go on, each with the tokens that it would have had."""
    house = open_house()
    compute = house.decoder._logits

    def damaged(numbers):
        logits = compute(numbers)
        logits[logits.argmax(-1) == 200 + at] = torch.nan
        return logits

    house.decoder._logits = damaged
    takers = [house.ask(100 * number, 6) for number in (1, 2, 3)]
    results = [taker.all() for taker in takers]
    assert isinstance(results[1][1], Refused) and results[1][1].cause == "fault"
    for (replies, last), first in ((results[0], 100), (results[2], 300)):
        assert isinstance(last, Ended)
        assert replies == {0: [*range(first, first + 6), None]}


def test_a_request_that_arrives_counts_once(open_house, monkeypatch):
    found, read = [], Engine._read

    def looking(engine, work):
        found.append((engine.is_full, engine.state.waiting))
        read(engine, work)

    monkeypatch.setattr(Engine, "_read", looking)
    house = open_house(max_queue=2)
    assert house.ask(100, 2).ids() == [100, 101, None]
    assert found == [(False, 1)]


def test_what_no_batch_can_hold_is_refused_at_once(open_house):
    house = open_house(bounds=BatchBounds(rows=4))
    with pytest.raises(UserError, match="the prompt has 2 tokens and the reply up to 63, and the model takes 64"):
        house.ask(1, 2, most=63)
    with pytest.raises(UserError, match="5 replies are asked for, and at most 4"):
        house.ask(1, 2, n=5)


def test_a_prompt_that_fails_fails_alone(open_house):
    house = open_house(held=True)
    first = house.ask(100, 4)
    first.next()

    def fail(rows):
        if any(row.ids[0] == 666 for row in rows):
            raise RuntimeError("broken")

    house.decoder.before_join = fail
    others = [house.ask(200, 2), house.ask(666, 2), house.ask(300, 2)]
    house.decoder.permit(100)
    assert others[0].ids() == [200, 201, None]
    assert others[1].all() == ({}, Refused("fault", "a fault of the server, which is in its log"))
    assert others[2].ids() == [300, 301, None]
    assert first.ids() == [101, 102, 103, None]


def test_a_step_that_fails_once_harms_nobody(open_house):
    house = open_house()
    failures = [RuntimeError("a hiccup")]

    def fail(numbers):
        if failures:
            raise failures.pop()

    house.decoder.before_step = fail
    takers = [house.ask(100, 3), house.ask(200, 2)]
    assert [taker.ids() for taker in takers] == [[100, 101, 102, None], [200, 201, None]]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_step_that_fails_for_one_row_ends_that_one(open_house, bad):
    house = open_house(held=True)
    takers = [house.ask(100 * n, 4) for n in (1, 2, 3)]
    for taker in takers:
        taker.next()
    begins = 100 * (bad + 1)

    def fail(numbers):
        # The scripts of live rows say which rows they are.
        if any(left and begins <= left[0] < begins + 100 for left in house.decoder._rows.values()):
            raise RuntimeError("broken")

    house.decoder.before_step = fail
    house.decoder.permit(1000)
    for number, taker in enumerate(takers):
        if number == bad:
            assert taker.all()[1].cause == "fault"
        else:
            first = 100 * (number + 1)
            assert taker.ids() == [first + 1, first + 2, first + 3, None]


def test_a_step_without_memory_sets_the_last_aside_and_its_stream_goes_on(open_house):
    house = open_house(held=True)
    takers = [house.ask(100, 4), house.ask(200, 4)]
    for taker in takers:
        taker.next()
    house.decoder.permit(1)
    for taker in takers:
        taker.next()

    def fail(numbers):
        if len(numbers) > 1:
            raise SHORT_OF_MEMORY

    house.decoder.before_step = fail
    house.decoder.permit(1000)
    assert takers[0].ids() == [102, 103, None]
    assert takers[1].ids() == [202, 203, None], "it goes on where it was, with nothing twice"
    assert house.engine.state.set_aside == 1
    assert house.engine.state.token_bound == 2 * 5 * 9 // 10, "two rows of five tokens did not fit"
    assert house.decoder.live == []


def test_a_drawn_reply_that_begins_anew_draws_the_same(open_house):
    house = open_house(held=True)
    # Any of all tokens but the stop token, as likely as the others.
    flat = torch.zeros(1000).index_fill(0, torch.tensor(STOP), -torch.inf)
    house.decoder._logits = lambda numbers: flat.expand(len(numbers), -1)
    sampling = Sampling(temperature=1.0)
    takers = [house.ask(1, 1, most=6, sampling=sampling), house.ask(1, 2, most=6, sampling=sampling)]
    before = [taker.next().token.id for taker in takers]

    def fail(numbers):
        if len(numbers) > 1:
            raise SHORT_OF_MEMORY

    house.decoder.before_step = fail
    house.decoder.permit(1000)
    replies = [[first, *taker.ids()] for first, taker in zip(before, takers, strict=True)]
    assert all(len(reply) == 6 for reply in replies)
    assert replies[0] != replies[1]
    assert len(house.decoder.joined) == 2 + (len(house.decoder.joined[0]) == 1)


def test_a_reply_that_would_go_on_otherwise_is_refused(open_house):
    house = open_house(held=True)
    takers = [house.ask(100, 4), house.ask(200, 4)]
    for taker in takers:
        taker.next()

    def fail(numbers):
        if len(numbers) > 1:
            house.decoder._script = lambda row: [7, 8]  # the model has changed its mind
            raise SHORT_OF_MEMORY

    house.decoder.before_step = fail
    house.decoder.permit(1000)
    assert takers[0].ids() == [101, 102, 103, None]
    replies, last = takers[1].all()
    assert (replies, last.cause) == ({}, "memory")
    assert house.decoder.live == []


def test_a_prompt_without_memory_waits_for_the_others_or_is_refused(open_house):
    house = open_house(held=True)
    first = house.ask(100, 4)
    first.next()

    def fail(rows):
        if house.decoder.live or rows[0].ids[0] == 666:
            raise SHORT_OF_MEMORY

    house.decoder.before_join = fail
    second, never = house.ask(200, 2), house.ask(666, 2)
    house.decoder.permit(1000)
    assert first.ids() == [101, 102, 103, None]
    assert second.ids() == [200, 201, None]
    assert never.all()[1].cause == "memory"
    assert house.decoder.dropped > 0, "what was kept was given up first"
    assert house.ask(300, 1).ids() == [300, None], "the engine goes on"


def test_the_batch_keeps_within_its_bounds(open_house):
    house = open_house(held=True, bounds=BatchBounds(rows=2))
    takers = [house.ask(100 * n, 3) for n in range(1, 6)]
    house.decoder.permit(1000)
    for n, taker in enumerate(takers, start=1):
        assert taker.ids() == [100 * n, 100 * n + 1, 100 * n + 2, None]
    assert max(house.decoder.steps) == 2


def test_replies_that_outgrow_the_batch_take_turns(open_house, monkeypatch):
    monkeypatch.setattr("finetune.serve.work.EXPECTED", 1)
    house = open_house(bounds=BatchBounds(tokens=16))  # four rows of 2 + 1, and not four of 2 + 9
    takers = [house.ask(100 * n, 9) for n in range(1, 5)]
    for n, taker in enumerate(takers, start=1):
        assert taker.ids() == [*range(100 * n, 100 * n + 9), None]
    assert house.engine.state.set_aside > 0
    assert house.engine.state.token_bound == 16


def test_an_image_that_cannot_be_read_ends_its_request_alone(open_house):
    house = open_house()
    bad = house.ask(1, 2, images=[ImageRequest(b"no image", ImageAccess(), "messages[0].content[0]")])
    good = house.ask(100, 2, images=[picture(1)])
    replies, last = bad.all()
    assert (replies, last.cause) == ({}, "input")
    assert last.message.startswith("messages[0].content[0] (8 bytes): its content is not an image")
    assert good.ids() == [100, 101, None]


def test_an_image_is_encoded_once_while_its_features_are_kept(open_house, tiny_processor):
    house = open_house()
    seen: list[torch.Tensor] = []
    house.decoder.before_join = lambda rows: seen.extend(feature for row in rows for feature in row.features)
    for shade in (1, 2, 1, 2, 1):
        house.ask(100, 1, images=[picture(shade)]).ids()
    assert house.model.encoded == 2
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])
    assert (house.engine.state.pictures, house.engine.state.pictures_encoded) == (5, 2)
    one = seen[0].nbytes
    small = open_house(keep_feature_bytes=one)
    for shade in (1, 1, 2, 2, 1):
        small.ask(100, 1, images=[picture(shade)]).ids()
    assert small.model.encoded == 3


def test_pictures_are_encoded_some_at_a_time(open_house):
    house = open_house(bounds=BatchBounds(images=2))
    sizes: list[int] = []
    encode = house.model.encode
    house.engine._encoder._encode = lambda pixels, adapter: (sizes.append(len(pixels)), encode(pixels, adapter))[1]
    assert house.ask(100, 1, images=[picture(shade) for shade in range(5)]).ids() == [100, None]
    assert sizes == [2, 2, 1]


def test_encoding_without_memory_takes_fewer_and_a_fault_ends_its_request(open_house):
    house = open_house(held=True)
    house.ask(100, 1).next()
    encode, black = house.model.encode, [True]

    def fail(pixels, adapter):
        if len(pixels) > 1:
            raise SHORT_OF_MEMORY
        if black and int(pixels.max()) == 0:
            raise ValueError("a black picture")
        return encode(pixels, adapter)

    house.engine._encoder._encode = fail
    bad, good = house.ask(100, 2, images=[picture(0)]), house.ask(200, 2, images=[picture(9), picture(8)])
    house.decoder.permit(1000)
    assert bad.all()[1].cause == "fault"
    assert good.ids() == [200, 201, None]


def test_several_replies_to_one_prompt_draw_apart(open_house):
    house = open_house()
    house.decoder._logits = lambda numbers: torch.zeros(len(numbers), 1000)
    drawn = Sampling(temperature=1.0, seed=7)
    together, last = house.ask(1, 2, n=3, most=4, sampling=drawn).all()
    assert sorted(together) == [0, 1, 2]
    assert len({tuple(reply) for reply in together.values()}) == 3
    assert last == Ended(Usage(prompt=2, completion=12, cached=0))
    alone, _ = house.ask(1, 2, most=4, sampling=drawn).all()
    assert alone[0] == together[0]
    unseeded = [house.ask(1, 2, most=4, sampling=Sampling(temperature=1.0)).ids() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_a_taker_that_fails_harms_nobody(open_house):
    house = open_house(held=True)

    def broken(event):
        raise RuntimeError("the reader's fault")

    house.engine.submit(Asked([100, 9], 10, (STOP,)), broken)
    good = house.ask(200, 2)
    house.decoder.permit(1000)
    assert good.ids() == [200, 201, None]
    house.settle()


def test_work_is_done_between_steps(open_house):
    house = open_house(held=True)
    taker = house.ask(100, 3)
    taker.next()
    done = house.engine.run_between_steps(lambda: (threading.current_thread().name, len(house.decoder.steps)))
    failed = house.engine.run_between_steps(lambda: 1 / 0)
    house.decoder.permit(1000)
    assert done.result(20) == ("engine", 1)
    with pytest.raises(ZeroDivisionError):
        failed.result(20)
    assert taker.ids() == [101, 102, None]
    assert house.engine.run_between_steps(lambda: 5).result(20) == 5


def test_closing_lets_what_was_taken_finish(open_house):
    house = open_house(held=True, bounds=BatchBounds(rows=1))
    runs, waits = house.ask(100, 3), house.ask(200, 2)
    runs.next()
    closing = threading.Thread(target=house.engine.close, args=(20,))
    closing.start()
    while not house.engine.is_closing:
        time.sleep(0.001)
    with pytest.raises(EngineClosed):
        house.ask(300, 1)
    house.decoder.permit(1000)
    assert (runs.ids(), waits.ids()) == ([101, 102, None], [200, 201, None])
    closing.join(20)
    assert not closing.is_alive()
    assert not house.engine.failed


def test_closing_ends_what_does_not_finish_in_time(open_house):
    house = open_house(held=True, bounds=BatchBounds(rows=1))
    runs, waits = house.ask(100, 9), house.ask(200, 2)
    runs.next()
    closing = threading.Thread(target=house.engine.close, args=(0,))
    closing.start()
    while not house.engine.is_closing:
        time.sleep(0.001)
    house.decoder.permit(1)
    replies, last = runs.all()
    assert (replies, last.cause) == ({0: [101]}, "closing")
    assert waits.all() == ({}, last)
    closing.join(20)
    with pytest.raises(EngineClosed):
        house.engine.run_between_steps(lambda: 1)


def test_a_device_that_is_lost_ends_the_engine(open_house):
    house = open_house(held=True)
    takers = [house.ask(100, 9), house.ask(200, 9)]
    for taker in takers:
        taker.next()

    def fail(numbers):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    house.decoder.before_step = fail
    house.decoder.permit(1000)
    assert [taker.all()[1].cause for taker in takers] == ["fault", "fault"]
    assert house.engine.failed
    house.engine.close(0)
    assert house.engine.failed, "and stays so"
    with pytest.raises(EngineClosed):
        house.ask(300, 1)

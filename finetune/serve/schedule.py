"""Which requests are in the running batch, and what becomes of them. Used by the engine's thread alone.

A request that fails ends alone. Where memory is short, the bounds of the batch become lower, and the request that
joined last waits, to begin anew; only one that does not fit by itself is refused.
"""

import logging
from collections import deque
from collections.abc import Sequence

import torch

from finetune.batches.attempt import OutOfMemory, attempt
from finetune.errors import InputError
from finetune.replies.running_batch import NewToken, RunningBatch
from finetune.serve.asked import REFUSALS, Cause, Ended, Event, Refused
from finetune.serve.batch_bounds import BatchBounds
from finetune.serve.picture_encoding import PictureEncoder
from finetune.serve.work import NotRepeated, Work

logger = logging.getLogger(__name__)


class Schedule:
    """Requests that wait and requests that run.

    Args:
        batch: without replies.
        encoder: of pictures.
        bounds: of the batch; they are lowered where memory is short.

    Attributes:
        waiting: requests that are not in the batch, in their order.
        running: those that are, in the order in which they joined.
        prompt_tokens, cached_tokens, reply_tokens: of all requests that joined; cached ones are of the prompts' and
            were known before.
        pictures: of all requests that joined.
        set_aside: how often a request was taken out of the batch, to be begun anew.
    """

    def __init__(self, batch: RunningBatch, encoder: PictureEncoder, bounds: BatchBounds) -> None:
        self._batch, self._encoder, self._bounds = batch, encoder, bounds
        self.waiting: deque[Work] = deque()
        self.running: list[Work] = []
        self.prompt_tokens = self.cached_tokens = self.reply_tokens = self.pictures = self.set_aside = 0

    @property
    def rows(self) -> int:
        """Replies in the batch."""
        return sum(len(work.numbers) for work in list(self.running))

    @property
    def _longest(self) -> int:
        """Tokens of the longest row in the batch."""
        return max((work.length for work in self.running), default=0)

    def join_waiting(self) -> None:
        """Join the requests that have waited longest, as far as there is room and one prefill goes."""
        group = self._next_group()
        self._encode(group)
        ready: list[Work] = []
        for work in group:
            if work.missing or work not in self.waiting:
                break
            ready.append(work)
        if ready:
            self._join(ready)

    def step(self) -> None:
        """A token for each reply that runs."""
        while len(self.running) > 1 and not self._bounds.hold(self.rows, self._longest + 1):
            self._set_aside(self.running[-1])
        failure: Exception | None = None
        suspect: Work | None = None  # the last one that was taken out for the failure
        while self.running:
            try:
                tokens = attempt(self._batch.step)
            except Exception as error:
                if failure is None and not is_lost(error):
                    failure = error
                    continue  # it may pass
                failure = error
                if is_lost(error) or len(self.running) == 1:
                    self._blame(self.running[-1:], error)
                    return
                suspect = self.running[-1]
                self._set_aside(suspect)
                continue
            if not isinstance(tokens, OutOfMemory):
                self._hand_out(tokens)
                if suspect is not None and failure is not None:
                    self._blame([suspect], failure)  # without it the others go on
                return
            if self._drop_kept():
                continue
            if len(self.running) == 1:
                self.refuse(self.running[0], "memory")
                return
            self._bounds.lower(self.rows, self._longest + 1)
            self._set_aside(self.running[-1])

    def refuse(self, work: Work, cause: Cause) -> None:
        """End a request with an error."""
        self.remove(work)
        tell(work, Refused(cause, REFUSALS[cause]))

    def fail(self, work: Work, failure: Exception) -> None:
        """End a request for what went wrong with it: the fault of who asked, or ours."""
        if not isinstance(failure, InputError):
            logger.error("a request has failed", exc_info=failure)
            self.refuse(work, "fault")
            return
        self.remove(work)
        tell(work, Refused("input", str(failure)))

    def remove(self, work: Work) -> None:
        """Take a request out, wherever it is."""
        if work in self.running:
            self.running.remove(work)
            self._batch.leave(list(work.numbers))
            work.numbers.clear()
        elif work in self.waiting:
            self.waiting.remove(work)

    def _next_group(self) -> list[Work]:
        rows, length = self.rows, self._longest
        group: list[Work] = []
        prefill = 0
        for work in self.waiting:
            if work.pictures is None:
                continue  # they are being read: others pass
            own = len(work.asked.ids)
            rows, length = rows + len(work.open_choices), max(length, work.expected_length)
            if (self.running or group) and not self._bounds.hold(rows, length):
                break
            if group and prefill + own > self._bounds.prefill_tokens:
                break
            group.append(work)
            prefill += own
        return group

    def _encode(self, group: Sequence[Work]) -> None:
        """Encode pictures of requests, as many as may be at once; the others have their turn in a later round."""
        result = self._encoder.encode(group, self._bounds.images)
        for work, failure in result.failed:
            self._blame([work], failure)
        if result.out_of_memory is not None:
            if result.together > 1:
                self._bounds.images = result.together // 2
            else:
                self._make_room(result.out_of_memory)

    def _join(self, group: Sequence[Work]) -> None:
        requests = [request for work in group for request in work.requests()]
        try:
            joined = attempt(lambda: self._batch.join(requests))
        except Exception as error:
            if len(group) == 1:
                self._blame(group, error)
            else:
                for work in group:
                    self._join([work])
            return
        if isinstance(joined, OutOfMemory):
            if len(group) > 1:
                self._bounds.prefill_tokens = sum(len(work.asked.ids) for work in group) // 2
            else:
                self._make_room(group[0])
            return
        numbers, tokens = joined
        rest = iter(zip(numbers, self._batch.reused, strict=True))
        for work in group:
            known = []
            for choice in work.open_choices:
                choice.seen = 0
                number, reused = next(rest)
                work.numbers[number] = choice
                known.append(reused)
            work.cached = known[0]  # the prompt counts once, and the replies after the first find it there
            self.cached_tokens += work.cached
            self.waiting.remove(work)
            self.running.append(work)
            self.prompt_tokens += len(work.asked.ids)
            self.pictures += len(work.pictures or ())
        self._hand_out(tokens)

    def _make_room(self, work: Work) -> None:
        """Memory did not hold a request beside those that run: drop what can be, or let it wait, or refuse it."""
        if self._drop_kept():
            return
        if self.running:
            rows = self.rows + len(work.open_choices)
            self._bounds.lower(rows, max(self._longest, work.expected_length))
        else:
            self.refuse(work, "memory")

    def _drop_kept(self) -> bool:
        """Give up what is kept for later requests; whether there was any."""
        had_features = self._encoder.cache.clear()
        return self._batch.drop_kept() or had_features

    def _set_aside(self, work: Work) -> None:
        """Take a request out of the batch, to begin its open replies anew when there is room."""
        self.set_aside += 1
        self.remove(work)
        self.waiting.appendleft(work)

    def _hand_out(self, tokens: Sequence[NewToken]) -> None:
        owners = {number: (work, choice) for work in self.running for number, choice in work.numbers.items()}
        for token in tokens:
            if token.finish is not None:
                del owners[token.reply][0].numbers[token.reply]  # it has left the batch by itself
        for token in tokens:
            work, choice = owners[token.reply]
            if work not in self.running:
                continue  # another of its replies has ended it
            try:
                event = choice.take(token)
            except NotRepeated:
                logger.error("a reply that was begun anew went on differently")
                self.refuse(work, "memory")
                continue
            if event is None:
                continue
            self.reply_tokens += token.id is not None
            tell(work, event)
            if not work.open_choices:
                self.running.remove(work)
                tell(work, Ended(work.usage))

    def _blame(self, group: Sequence[Work], failure: Exception) -> None:
        """These requests have failed.

        Raises:
            Exception: the failure itself, after which the device cannot be used.
        """
        if is_lost(failure):
            raise failure
        for work in group:
            self.fail(work, failure)


def tell(work: Work, event: Event) -> None:
    """Hand out an event of a request. A taker that fails gets no more."""
    if work.cancelled:
        return
    try:
        work.on_event(event)
    except Exception:
        logger.exception("an event could not be handed out")
        work.cancelled = True


def is_lost(error: Exception) -> bool:
    """Whether the device cannot be used by this process any more: after an error on it, CUDA fails every call."""
    return isinstance(error, torch.AcceleratorError)

"""The thread that runs a model for many requests: the only one that touches it.

    requests  ->  wait while their pictures are read  ->  join the running batch  ->  a token a step  ->  events
                  (reader threads)                        (one prefill a round)

A round of the thread: work that was given to it (an adapter to load), removal of what nobody wants any more, pictures
encoded and prompts joined, one step. So replies that run wait at most for one group of prompts between two tokens.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from finetune.batches.budget import KEPT_FEATURE_BYTES
from finetune.errors import UserError
from finetune.replies.running_batch import RunningBatch
from finetune.serve.asked import REFUSALS, Asked, Cause, EngineClosed, Event, QueueFull, Refused
from finetune.serve.batch_bounds import BatchBounds
from finetune.serve.feature_cache import FeatureCache
from finetune.serve.picture_encoding import PictureEncoder
from finetune.serve.picture_reading import Picture, PictureReaders
from finetune.serve.replier import ReplierState
from finetune.serve.schedule import Schedule, tell
from finetune.serve.work import Choice, Work

if TYPE_CHECKING:
    from finetune.serve.opened_model import OpenedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")

LAST_STEP = 30.0
"""Seconds that `Engine.close` waits for a step that runs, after its grace."""


class Ticket:
    """A request that the engine has taken."""

    def __init__(self, work: Work, news: threading.Condition) -> None:
        self._work, self._news = work, news

    def cancel(self) -> None:
        """End it before the next step; no more events come then. From any thread, any number of times."""
        with self._news:
            self._work.cancelled = True
            self._news.notify()


class Engine:
    """Replies to many requests in one running batch.

    Args:
        model: what replies; nothing else may use it.
        max_queue: most requests that wait.
        bounds: of the batch.
        keep_feature_bytes: bytes of image features that are kept for later requests.
    """

    def __init__(
        self,
        model: "OpenedModel",
        *,
        max_queue: int = 64,
        bounds: BatchBounds | None = None,
        keep_feature_bytes: int = KEPT_FEATURE_BYTES,
    ) -> None:
        self._model, self._max_queue = model, max_queue
        self._bounds = (bounds or BatchBounds()).within(model.decoder.most_rows, model.decoder.most_tokens)
        self._context, self._most_rows = model.decoder.context, self._bounds.rows
        cache = FeatureCache(keep_feature_bytes)
        self._encoder = PictureEncoder(model.encode, cache)
        self._readers = None if model.image_processor is None else PictureReaders(model.image_processor, cache)
        batch = RunningBatch(model.decoder, model.tokenizer)
        self._schedule = Schedule(batch, self._encoder, self._bounds)  # of the engine's thread alone
        self._news = threading.Condition()  # guards what other threads write: the next four
        self._arrived: deque[Work] = deque()
        self._between: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._close_at: float | None = None  # when what still runs is ended; None while requests are taken
        self._has_ended = self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- from any thread

    def submit(self, asked: Asked, on_event: Callable[[Event], None]) -> Ticket:
        """Ask for replies; does not wait.

        Args:
            asked: what is wanted.
            on_event: called in the engine's thread with each event, the last of which is `Ended` or `Refused`; after
                `Ticket.cancel` there may be none. It must return at once: while it works no reply grows.

        Raises:
            QueueFull: as many requests wait as may.
            EngineClosed: it takes no more.
            UserError: no batch of this engine can hold it, or the model takes no images.
        """
        if len(asked.ids) + asked.max_new_tokens > self._context:
            raise UserError(
                f"the prompt has {len(asked.ids):,} tokens and the reply up to {asked.max_new_tokens:,}, and the "
                f"model takes {self._context:,} together"
            )
        if asked.n > self._most_rows:
            raise UserError(
                f"{asked.n} replies are asked for, and at most {self._most_rows} grow together (--batch-rows)"
            )
        if asked.images and self._readers is None:
            raise UserError("this model takes no images: leave them out")
        if asked.sampling.seed is None:
            asked = replace(asked, sampling=replace(asked.sampling, seed=random.getrandbits(48)))
        work = Work(asked, on_event, [Choice(index) for index in range(asked.n)])
        with self._news:
            self._require_open()
            if self.is_full:
                raise QueueFull
            self._arrived.append(work)
            self._news.notify()
        return Ticket(work, self._news)

    def run_between_steps(self, work: Callable[[], T]) -> "Future[T]":
        """Run `work` in the engine's thread between two steps, where it may use the model: load an adapter, say.

        Raises:
            EngineClosed: it takes no more.
        """
        future: Future[T] = Future()
        with self._news:
            self._require_open()
            self._between.append((future, work))
            self._news.notify()
        return future

    def close(self, grace: float) -> None:
        """Take no more requests, let those that were taken finish for `grace` seconds, and end the others.

        May be called again, from another thread, with less time. Returns once the thread has ended.
        """
        with self._news:
            end = time.monotonic() + grace
            self._close_at = end if self._close_at is None else min(self._close_at, end)
            self._news.notify()
        while self._thread.is_alive() and time.monotonic() < self._close_at + LAST_STEP:
            self._thread.join(0.05)

    @property
    def failed(self) -> bool:
        """Whether its thread has ended by itself, by a fault after which the device cannot be used."""
        return self._has_failed

    @property
    def is_full(self) -> bool:
        """Whether `submit` would raise `QueueFull`."""
        return len(self._arrived) + len(self._schedule.waiting) >= self._max_queue

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return self._close_at is not None

    @property
    def state(self) -> ReplierState:
        """What it is doing, and has done."""
        return ReplierState(
            waiting=len(self._arrived) + len(self._schedule.waiting),
            rows=self._schedule.rows,
            row_bound=self._bounds.rows,
            token_bound=self._bounds.tokens,
            prompt_tokens=self._schedule.prompt_tokens,
            cached_tokens=self._schedule.cached_tokens,
            reply_tokens=self._schedule.reply_tokens,
            pictures=self._schedule.pictures,
            pictures_encoded=self._encoder.count,
            set_aside=self._schedule.set_aside,
        )

    def _require_open(self) -> None:
        if self._close_at is not None or self._has_ended:
            raise EngineClosed

    # --- the engine's thread

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._wait_for_news():
                self._remove_unwanted()
                self._run_given_work()  # what drops an adapter comes after what had it
                self._schedule.join_waiting()
                self._schedule.step()
            for work in list(self._schedule.running):
                self._schedule.refuse(work, "closing")
        except BaseException:
            logger.exception("the engine has failed")
            self._has_failed = True
        finally:
            with self._news:
                cause: Cause = "fault" if self._has_failed else "closing"
                left = [*self._schedule.running, *self._schedule.waiting, *self._arrived]
                self._has_ended = True
                self._schedule.running.clear()
                self._schedule.waiting.clear()
                self._arrived.clear()
            for work in left:
                tell(work, Refused(cause, REFUSALS[cause]))
            for future, _ in self._between:
                future.set_exception(EngineClosed())
            if self._readers is not None:
                self._readers.close()

    def _wait_for_news(self) -> bool:
        """Wait until there is something to do; False once all is done and nothing more will come."""
        with self._news:
            while True:
                while self._arrived:
                    work = self._arrived.popleft()  # first: counted twice, it would fill the queue for `is_full`
                    self._schedule.waiting.append(work)
                    self._read(work)
                if self._close_at is not None:
                    over = time.monotonic() >= self._close_at or not (self._schedule.running or self._schedule.waiting)
                    if over and not self._between:
                        return False
                if self._between or self._schedule.running or any(map(self._needs_attention, self._schedule.waiting)):
                    return True
                self._news.wait(self._seconds_to_next_end())

    def _needs_attention(self, work: Work) -> bool:
        return work.pictures is not None or work.failure is not None or self._is_unwanted(work)

    def _is_unwanted(self, work: Work) -> bool:
        deadline = work.asked.deadline
        return work.cancelled or (deadline is not None and time.monotonic() >= deadline)

    def _seconds_to_next_end(self) -> float | None:
        ends = [work.asked.deadline for work in self._schedule.waiting] + [self._close_at]
        known = [end for end in ends if end is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    def _read(self, work: Work) -> None:
        """Have a request's pictures read. The lock is held."""
        images = work.asked.images
        work.asked = replace(work.asked, images=())  # let go as soon as they are read
        if not images or self._readers is None:
            work.pictures = []
            return

        def done(read: list[Picture] | Exception) -> None:
            with self._news:
                if isinstance(read, Exception):
                    work.failure = read
                else:
                    work.pictures = read
                self._news.notify()

        key_prefix = f"{self._model.vision_key(work.asked.adapter)} "
        self._readers.read(images, key_prefix, lambda: not self._is_unwanted(work), done)

    def _run_given_work(self) -> None:
        while self._between:
            future, work = self._between.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)

    def _remove_unwanted(self) -> None:
        for work in [*self._schedule.running, *self._schedule.waiting]:
            if work.cancelled:
                self._schedule.remove(work)
            elif self._is_unwanted(work):
                self._schedule.refuse(work, "timeout")
            elif work.failure is not None:
                self._schedule.fail(work, work.failure)

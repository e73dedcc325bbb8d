"""The engine whose language model runs elsewhere: images are encoded here, a vLLM server makes the replies."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Literal

import torch

from finetune.batches.image_request import ImageRequest
from finetune.errors import InputError, UserError
from finetune.export.qwen2_prompt_embeddings import PromptEncoder, encoded_for_server
from finetune.replies.running_batch import NewToken, TokenLogprob
from finetune.replies.text_stream import TextStream, TokenBytes
from finetune.serve.asked import (
    REFUSALS,
    Asked,
    ChoiceToken,
    Ended,
    EngineClosed,
    Event,
    QueueFull,
    Refused,
    Usage,
)
from finetune.serve.feature_cache import FeatureCache
from finetune.serve.picture_reading import Picture, PictureReaders
from finetune.serve.replier import ReplierState
from finetune.serve.vllm_completions import Piece, completion_request
from finetune.serve.vllm_server import Body, ServerFailed, Streams, VllmServer

logger = logging.getLogger(__name__)


class VllmTicket:
    """A request that the engine has taken."""

    def __init__(self) -> None:
        self.is_wanted = True
        self.task: Future[None] | None = None

    def cancel(self) -> None:
        """End it; no more events come. From any thread, any number of times."""
        self.is_wanted = False
        if self.task is not None:
            self.task.cancel()


class VllmEngine:
    """Replies by a vLLM server, as `finetune.serve.replier.Replier` says.

    It keeps nothing of a request but the features of its images: any number of these may stand before one server, or
    before several that serve the same folder behind a balancer. One thread of its own talks to the server, and one
    encodes images.

    Args:
        server: that serves the folder.
        served_name: of the model there.
        encoder: of the folder.
        context: most tokens of a prompt and its reply.
        max_open: most requests at once; the server has a queue of its own.
        keep_feature_bytes: bytes of image features that are kept for later requests.
    """

    def __init__(
        self,
        server: VllmServer,
        served_name: str,
        encoder: PromptEncoder,
        *,
        context: int,
        max_open: int,
        keep_feature_bytes: int,
    ) -> None:
        self._server, self._served_name, self._encoder = server, served_name, encoder
        self._context, self._max_open = context, max_open
        self._token_bytes = TokenBytes(encoder.processor.tokenizer)
        self._features = FeatureCache(keep_feature_bytes)
        self._readers = PictureReaders(encoder.processor.image_processor, self._features)
        self._encoding = ThreadPoolExecutor(1, "encode-images")
        self._open: set[VllmTicket] = set()
        self._lock = threading.Lock()
        self._close_at: float | None = None
        self._prompt_tokens = self._reply_tokens = self._pictures = self._pictures_encoded = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._connections: Streams
        begun = threading.Event()
        self._thread = threading.Thread(target=self._run_loop, args=[begun], name="vllm", daemon=True)
        self._thread.start()
        begun.wait()

    def submit(self, asked: Asked, on_event: Callable[[Event], None]) -> VllmTicket:
        """Ask for replies. From any thread; does not wait.

        Args:
            asked: what is wanted.
            on_event: called in the engine's thread with each event, the last of which is `Ended` or `Refused`. It must
                return at once: while it works no reply grows.

        Raises:
            QueueFull: as many requests are open as may be.
            EngineClosed: it takes no more.
            UserError: the server's model cannot hold it, or so many replies are not made at once.
        """
        if self._context < len(asked.ids) + asked.max_new_tokens:
            raise UserError(
                f"the prompt has {len(asked.ids):,} tokens and the reply up to {asked.max_new_tokens:,}, and the "
                f"model takes {self._context:,} together"
            )
        if asked.n > self._max_open:
            raise UserError(f"{asked.n} replies are asked for, and at most {self._max_open} are made at once")
        ticket = VllmTicket()
        with self._lock:
            if self._close_at is not None or not self._thread.is_alive():
                raise EngineClosed
            if self.is_full:
                raise QueueFull
            self._open.add(ticket)
            ticket.task = asyncio.run_coroutine_threadsafe(self._reply(asked, on_event, ticket), self._loop)
        ticket.task.add_done_callback(lambda _: self._left(ticket))
        if not ticket.is_wanted:  # cancelled before it had a task
            ticket.task.cancel()
        return ticket

    def close(self, grace: float) -> None:
        """Take no more requests, let those that were taken finish for `grace` seconds, and end the others.

        May be called again, from another thread, with less time. Returns once the thread has ended.
        """
        with self._lock:
            end = time.monotonic() + grace
            self._close_at = end if self._close_at is None else min(self._close_at, end)
        while self._open and time.monotonic() < self._close_at:
            time.sleep(0.02)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._readers.close()
        self._encoding.shutdown(wait=False)

    @property
    def failed(self) -> bool:
        """Whether its thread has ended by itself."""
        return self._close_at is None and not self._thread.is_alive()

    @property
    def is_full(self) -> bool:
        """Whether `submit` would raise `QueueFull`."""
        return len(self._open) >= self._max_open

    @property
    def is_closing(self) -> bool:
        """Whether `close` was called."""
        return self._close_at is not None

    @property
    def state(self) -> ReplierState:
        """What it is doing, and has done. What runs and what waits, the server alone knows: all of it runs here."""
        return ReplierState(
            rows=len(self._open),
            prompt_tokens=self._prompt_tokens,
            reply_tokens=self._reply_tokens,
            pictures=self._pictures,
            pictures_encoded=self._pictures_encoded,
        )

    def _run_loop(self, begun: threading.Event) -> None:
        try:
            self._loop.run_until_complete(self._run(begun))
        finally:
            self._loop.close()

    async def _run(self, begun: threading.Event) -> None:
        async with self._server.opened() as self._connections:
            begun.set()
            await self._stop.wait()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    def _left(self, ticket: VllmTicket) -> None:
        with self._lock:
            self._open.discard(ticket)

    async def _reply(self, asked: Asked, on_event: Callable[[Event], None], ticket: VllmTicket) -> None:
        def hand_out(event: Event) -> None:
            if ticket.is_wanted:
                on_event(event)

        try:
            left = None if asked.deadline is None else asked.deadline - time.monotonic()
            async with asyncio.timeout(left):
                bodies = await self._bodies(asked, ticket)
                asked = replace(asked, images=())  # let go, as are the bodies once they are sent
                replies = [
                    asyncio.create_task(self._one_reply(choice, asked, body, hand_out))
                    for choice, body in enumerate(bodies)
                ]
                del bodies
                try:
                    completion = sum(await asyncio.gather(*replies))
                finally:
                    for reply in replies:
                        reply.cancel()
        except asyncio.CancelledError:
            hand_out(Refused("closing", REFUSALS["closing"]))
            raise
        except TimeoutError:
            hand_out(Refused("timeout", REFUSALS["timeout"]))
        except InputError as error:
            hand_out(Refused("input", str(error)))
        except ServerFailed as failed:
            hand_out(Refused(failed.cause, failed.message))
        except Exception:
            logger.exception("a request failed")
            hand_out(Refused("fault", REFUSALS["fault"]))
        else:
            hand_out(Ended(Usage(len(asked.ids), completion, 0)))

    async def _bodies(self, asked: Asked, ticket: VllmTicket) -> list[Body]:
        """What is sent for each reply."""
        self._prompt_tokens += len(asked.ids)
        self._pictures += len(asked.images)
        pictures = await self._read(asked.images, ticket) if asked.images else []
        return await self._loop.run_in_executor(self._encoding, self._write_bodies, asked, pictures)

    async def _read(self, images: Sequence[ImageRequest], ticket: VllmTicket) -> list[Picture]:
        read: asyncio.Future[list[Picture]] = self._loop.create_future()

        def done(result: list[Picture] | Exception) -> None:
            self._loop.call_soon_threadsafe(settle, result)

        def settle(result: list[Picture] | Exception) -> None:
            if read.done():  # cancelled
                return
            if isinstance(result, Exception):
                read.set_exception(result)
            else:
                read.set_result(result)

        self._readers.read(images, "", lambda: ticket.is_wanted, done)
        return await read

    def _write_bodies(self, asked: Asked, pictures: list[Picture]) -> list[Body]:
        encoded = encoded_for_server(self._embed(list(asked.ids), pictures))
        bodies = []
        for choice in range(asked.n):
            request = completion_request(
                self._served_name,
                encoded,
                max_new_tokens=asked.max_new_tokens,
                stop_ids=asked.stop_ids,
                sampling=asked.sampling.nth(choice),
            )
            bodies.append(Body(request))
        return bodies

    def _embed(self, ids: list[int], pictures: list[Picture]) -> torch.Tensor:
        """(length, hidden) of a prompt, with its images."""
        for picture in pictures:
            # It may have been encoded for another request since it was read.
            picture.features = picture.features if picture.features is not None else self._features.get(picture.key)
            if picture.features is None:
                assert picture.pixels is not None
                picture.features = self._encoder.encode_images(picture.pixels[None])[0]
                self._pictures_encoded += 1
                self._features.put(picture.key, picture.features)
        features = [picture.features for picture in pictures if picture.features is not None]
        return self._encoder.embed(torch.tensor([ids]), torch.stack(features) if features else None)[0]

    async def _one_reply(self, choice: int, asked: Asked, body: Body, hand_out: Callable[[Event], None]) -> int:
        """Stream one reply; returns how many tokens it has, a stop token aside."""
        text, tokens = TextStream(self._token_bytes, asked.stop_texts, stops_in_lead=True), 0
        async with aclosing(self._connections.pieces(body)) as pieces:
            async for piece in pieces:
                for token in self._tokens(piece, choice, text, asked):
                    tokens += token.id is not None
                    self._reply_tokens += token.id is not None
                    hand_out(ChoiceToken(choice, token))
                    if token.finish is not None:
                        return tokens
        raise AssertionError("a stream of pieces ends with one that has a finish, or raises")

    def _tokens(self, piece: Piece, choice: int, text: TextStream, asked: Asked) -> Iterator[NewToken]:
        """What a piece adds, token by token, as `RunningBatch` gives it; the reply may end within the piece."""
        for place, token in enumerate(piece.ids):
            logprob = piece.logprobs[place] if piece.logprobs else None
            top: tuple[TokenLogprob, ...] = ()
            if asked.sampling.logprobs and piece.top_logprobs:
                # vLLM gives the token itself too, whether or not it is one of the likeliest.
                likeliest = sorted(piece.top_logprobs[place], key=lambda one: -one.logprob)
                top = tuple(likeliest[: asked.sampling.logprobs])
            if token in asked.stop_ids:
                yield NewToken(choice, None, text.end(), "stop", logprob, top)
                return
            new = text.add(token)
            finish: Literal["stop", "length"] | None = "stop" if text.stopped else None
            if finish is None and piece.finish is not None and place == len(piece.ids) - 1:
                new += text.end()
                finish = "stop" if text.stopped else piece.finish
            yield NewToken(choice, token, new, finish, logprob, top)
            if finish is not None:
                return
        if piece.finish is not None:  # without a token of its own
            new = text.end()
            yield NewToken(choice, None, new, "stop" if text.stopped else piece.finish)

"""`POST /v1/chat/completions`"""

import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from finetune.errors import InputError
from finetune.replies.sampling import Sampling
from finetune.serve.api.api import Api
from finetune.serve.api.chat_reply import ChatReply, event
from finetune.serve.api.chat_request import ChatRequest, read_chat_request
from finetune.serve.api.errors import GONE, ApiError, closed, invalid, refused, too_many
from finetune.serve.api.mailbox import ClientGone, Mailbox, TooSlow, unless_gone
from finetune.serve.api.request_body import read_body, read_object
from finetune.serve.asked import Asked, ChoiceToken, Ended, EngineClosed, Event, QueueFull, Refused
from finetune.serve.request_error import RequestError
from finetune.serve.served_name import RequestPrompt
from finetune.serve.served_names import UnknownName


def chat_router(api: Api) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        began = time.monotonic()
        with ExitStack() as held:  # the name that is asked stays loaded, until the request has ended
            try:
                return await _answer(api, request, began, held)
            except ApiError as error:
                api.metrics.count_request(error.status)
                raise
            except (ClientGone, ClientDisconnect):
                api.metrics.count_request(GONE)
                return Response(status_code=GONE)  # nobody gets it
            except Exception:
                api.metrics.count_request(500)
                raise

    return router


async def _answer(api: Api, http: Request, began: float, held: ExitStack) -> Response:
    if api.replier.is_full:
        raise too_many()  # before its body takes memory
    async with api.arriving:
        body = await read_body(http, api.settings.max_body)
        # In a thread: decoding, fetching URLs and tokenising take a while.
        request, prompt, asked = await run_in_threadpool(_read, api, body, began, held)
        del body
    n = asked.n
    mailbox = Mailbox(streams=n if request.stream else 0)
    try:
        mailbox.ticket = api.replier.submit(asked, mailbox.put)
    except QueueFull:
        raise too_many() from None
    except EngineClosed:
        raise closed() from None
    except InputError as error:
        raise invalid(str(error)) from None
    del asked  # its images are long, and are let go once they are read
    stream = False
    try:
        # Before the status is sent, so that what is wrong with an image is an error of its own also in a stream.
        first = await unless_gone(http, mailbox.get())
        if isinstance(first, Refused):
            raise refused(first)
        api.metrics.first_token(time.monotonic() - began)
        reply = ChatReply(
            request.model,
            n,
            api.token_bytes.__getitem__,
            with_logprobs=bool(request.logprobs),
            boxes=prompt.boxes if request.boxes else None,
            with_usage=bool(request.stream_options and request.stream_options.include_usage),
        )
        if not request.stream:
            answer = JSONResponse(await unless_gone(http, _whole(first, mailbox, reply)))
            api.metrics.count_request(200)
            api.metrics.request_time(time.monotonic() - began)
            return answer
        stream = True
        return _EventStream(_Stream(api, first, mailbox, reply, began), held.pop_all())
    finally:
        if not stream:
            mailbox.ticket.cancel()


def _read(api: Api, body: bytearray, began: float, held: ExitStack) -> tuple[ChatRequest, RequestPrompt, Asked]:
    """Read a request and write its prompt; the request is given without its messages, and the prompt without its
    images. `held` gets the lease of its name."""
    settings = api.settings
    request = read_chat_request(read_object(body))
    try:
        name = held.enter_context(api.names.lease(request.model))
    except UnknownName as error:
        raise ApiError(404, str(error), param="model", code="model_not_found") from None
    try:
        prompt = name.render(
            request.messages,
            access=settings.images,
            most_images=settings.max_images,
            boxes=request.boxes is not None,
        )
    except RequestError as error:
        raise invalid(str(error), error.place) from None
    except InputError as error:
        raise invalid(str(error), "messages") from None
    room = settings.max_model_len - len(prompt.ids)
    most = room if request.most_tokens is None else request.most_tokens
    if room < 1 or most > room:
        wanted = "" if room < 1 else f", and the reply may have {most:,}"
        raise invalid(
            f"the prompt has {len(prompt.ids):,} tokens{_of_pictures(len(prompt.images), name.n_queries)}{wanted}: "
            f"this server takes {settings.max_model_len:,} together (--max-model-len)",
            "messages" if room < 1 else "max_tokens",
            "context_length_exceeded",
        )
    sampling = Sampling(
        settings.temperature if request.temperature is None else request.temperature,
        1.0 if request.top_p is None else request.top_p,
        request.seed,
        (request.top_logprobs or 0) if request.logprobs else None,
    )
    asked = Asked(
        prompt.ids,
        most,
        name.stop_ids,
        prompt.images,
        name.adapter,
        request.n or 1,
        tuple(request.stop or ()),
        sampling,
        began + settings.timeout,
    )
    request.messages.clear()
    return request, replace(prompt, images=[]), asked


def _of_pictures(pictures: int, n_queries: int) -> str:
    counted = "1 picture" if pictures == 1 else f"{pictures:,} pictures"
    return f" ({pictures * (n_queries + 2):,} of them for {counted})" if pictures else ""


async def _whole(first: Event, mailbox: Mailbox, reply: ChatReply) -> dict:
    """The answer of a request that is not streamed."""
    event = first
    while isinstance(event, ChoiceToken):
        reply.add(event.choice, event.token)
        event = await mailbox.get()
    if isinstance(event, Refused):
        raise refused(event)
    return reply.whole(event.usage)


class _Stream:
    """The pieces of a reply that is streamed."""

    def __init__(self, api: Api, first: Event, mailbox: Mailbox, reply: ChatReply, began: float) -> None:
        self._api, self._first, self._mailbox, self._reply, self._began = api, first, mailbox, reply, began
        self._status = GONE  # until it has ended otherwise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._reply.first_pieces():
            yield piece
        taken: Event = self._first
        while isinstance(taken, ChoiceToken):
            for piece in self._reply.pieces(taken.choice, taken.token):
                yield piece
            try:
                taken = await self._mailbox.get()
            except TooSlow:
                late = ApiError(408, "the stream was read too slowly, and the reply was ended", code="slow_reader")
                self._status = late.status
                yield event(late.body)
                return
        if isinstance(taken, Ended):
            self._status = 200
            self._api.metrics.request_time(time.monotonic() - self._began)
            for piece in self._reply.last_pieces(taken.usage):
                yield piece
        else:
            error = refused(taken)
            self._status = error.status
            yield event(error.body)

    def end(self) -> None:
        """It has ended, or its client has left."""
        assert self._mailbox.ticket is not None
        self._mailbox.ticket.cancel()
        self._api.metrics.count_request(self._status)


class _EventStream(StreamingResponse):
    """Sends a stream; `held` is let go when it has ended or the client has left."""

    def __init__(self, stream: _Stream, held: ExitStack) -> None:
        super().__init__(
            aiter(stream),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._held = held
        held.callback(stream.end)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)

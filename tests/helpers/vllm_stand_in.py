"""A server that takes and answers completions as vLLM does, for tests: the model is computed by Transformers.

The fields of a request, their types, what is refused, and the form of what is streamed are those of vLLM's source at
commit 002032ee2b18e1f7bd924ec47b62504ba3866063 (vllm/entrypoints/openai/completion/protocol.py and serving.py,
vllm/renderers/embed_utils.py, and the error and model lists of vllm/entrypoints/openai/engine/protocol.py). Unlike
vLLM, which ignores them, fields that it does not have are refused, and so are embeddings of another type.
"""

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

NewToken = tuple[int, torch.Tensor, str | None]
INT64 = Field(ge=-(2**63), le=2**63 - 1)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class CompletionRequest(BaseModel):
    """Every field of vLLM's request that is about one prompt and how it is continued."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: list[Annotated[int, Field(ge=0)]] | str | None = None
    echo: bool | None = False
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    max_tokens: int | None = 16
    n: int = 1
    presence_penalty: float | None = None
    seed: Annotated[int, INT64] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float = 1.0
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    bad_words: list[str] = Field(default_factory=list)
    prompt_embeds: str | None = None  # bytes there, which JSON has as a string
    add_special_tokens: bool = True
    priority: Annotated[int, INT64] = 0
    request_id: str | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class Refused(Exception):
    def __init__(self, message: str, status: int = 400, param: str | None = None):
        self.status = status
        self.error = {"message": message, "type": "BadRequestError", "param": param, "code": status}


@dataclass
class StandIn:
    """The server's model, what it was asked, and the faults that a test has it make.

    Attributes:
        folder: of the export that it serves.
        takes_embeddings: as with `--enable-prompt-embeds`.
        asked: the requests that were accepted, in order.
        embeddings: of each of them, (length, hidden).
        begun, left: how many streams began, and how many of them the client left before their end.
        refuse_with: an HTTP status that every completion is answered with; None for none.
        error_after, break_after: after this many tokens the stream has an error, or the connection breaks.
        seconds_a_token: waited before each token.
        bare_finish: the reason of the end comes in a piece of its own.
    """

    folder: Path
    takes_embeddings: bool = True
    key: str | None = None
    max_model_len: int = 2048
    max_logprobs: int = 20
    asked: list[CompletionRequest] = field(default_factory=list)
    embeddings: list[torch.Tensor] = field(default_factory=list)
    begun: int = 0
    left: int = 0
    refuse_with: int | None = None
    error_after: int | None = None
    break_after: int | None = None
    seconds_a_token: float = 0.0
    bare_finish: bool = False

    def __post_init__(self) -> None:
        self.name = str(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="auto").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        settings = json.loads((self.folder / "generation_config.json").read_text())
        eos = settings["eos_token_id"]
        self.eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)

    def check(self, asked: CompletionRequest) -> torch.Tensor:
        """The embeddings of a request that vLLM would take: (length, hidden).

        Raises:
            Refused: with vLLM's words, where it has some.
        """
        if asked.model not in (None, self.name):
            raise Refused(f"The model `{asked.model}` does not exist.", 404, "model")
        if asked.stream_options and not asked.stream:
            raise Refused("Stream options can only be defined when `stream=True`.", param="stream_options")
        if asked.logprobs is not None and not -1 <= asked.logprobs <= self.max_logprobs:
            raise Refused(f"Requested sample logprobs of {asked.logprobs}, which is greater than max allowed")
        if (asked.temperature or 0) < 0 or not 0 < (1.0 if asked.top_p is None else asked.top_p) <= 1:
            raise Refused("temperature or top_p is out of its range")
        if asked.prompt_embeds is not None:
            if not self.takes_embeddings:
                raise Refused("You must set `--enable-prompt-embeds` to input `prompt_embeds`.", param="prompt_embeds")
            content = base64.b64decode(asked.prompt_embeds, validate=True)
            embeddings = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            hidden = self.model.config.hidden_size
            if not isinstance(embeddings, torch.Tensor) or embeddings.ndim != 2 or embeddings.shape[1] != hidden:
                raise Refused("`prompt_embeds` must be a 2D tensor of shape (num_tokens, hidden_size)")
            if embeddings.dtype != self.model.dtype:
                raise Refused(f"`prompt_embeds` dtype {embeddings.dtype}, the model's {self.model.dtype}")
            if len(content) > embeddings.nbytes + 2000:
                raise Refused("`prompt_embeds` has the storage of a larger tensor")
        elif isinstance(asked.prompt, list) and asked.prompt:
            embeddings = self.model.get_input_embeddings()(torch.tensor(asked.prompt)).detach()
        else:
            raise Refused("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        if not 1 <= len(embeddings) <= self.max_model_len - (asked.max_tokens or 16):
            raise Refused(f"This model's maximum context length is {self.max_model_len} tokens.", param="max_tokens")
        return embeddings

    @torch.inference_mode()
    def tokens(
        self, asked: CompletionRequest, embeddings: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, str | None]]:
        """Each new token, the log-probabilities that it was chosen from, and why the reply ends with it."""
        cache, given = DynamicCache(config=self.model.config), {"inputs_embeds": embeddings[None]}
        draws = torch.Generator().manual_seed(asked.seed or 0)
        stops = {*(asked.stop_token_ids or ()), *(() if asked.ignore_eos else self.eos_ids)}
        most = 16 if asked.max_tokens is None else asked.max_tokens
        for number in range(1, most + 1):
            logits = self.model(**given, past_key_values=cache, use_cache=True).logits[0, -1].float()
            token = self._choose(logits, asked, draws)
            finish = "stop" if token in stops else "length" if number == most else None
            yield token, logits.log_softmax(-1), finish
            if finish:
                return
            given = {"input_ids": torch.tensor([[token]])}

    def _choose(self, logits: torch.Tensor, asked: CompletionRequest, draws: torch.Generator) -> int:
        if not asked.temperature:
            return int(logits.argmax())
        chances, ids = (logits / asked.temperature).softmax(-1).sort(descending=True)
        kept = chances.cumsum(-1) - chances < (asked.top_p or 1.0)
        return int(ids[torch.multinomial(chances * kept, 1, generator=draws)])

    def choice(self, asked: CompletionRequest, tokens: list[NewToken]) -> dict[str, Any]:
        ids, finish = [token for token, _, _ in tokens], tokens[-1][2]
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish, "stop_reason": None}
        shown = ids[:-1] if finish == "stop" else ids
        choice["text"] = self.tokenizer.decode(shown, skip_special_tokens=asked.skip_special_tokens)
        if finish == "stop" and ids[-1] in (asked.stop_token_ids or ()):
            choice["stop_reason"] = ids[-1]
        if asked.return_token_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": None}
        if asked.logprobs is not None:
            as_ids = asked.return_tokens_as_token_ids

            def name(token: int) -> str:
                return f"token_id:{token}" if as_ids else self.tokenizer.decode([token])

            top = []
            for token, likely, _ in tokens:
                values, likeliest = likely.topk(asked.logprobs)
                top.append({name(token): float(likely[token])})
                top[-1] |= {name(int(one)): float(value) for value, one in zip(values, likeliest, strict=True)}
            choice["logprobs"] = {
                "text_offset": [0] * len(ids),
                "token_logprobs": [float(likely[token]) for token, likely, _ in tokens],
                "tokens": [name(token) for token in ids],
                "top_logprobs": top,
            }
        return choice


def make_app(stand_in: StandIn) -> FastAPI:
    def authorized(request: Request) -> None:
        if stand_in.key is not None and request.headers.get("authorization") != f"Bearer {stand_in.key}":
            raise Refused("Unauthorized", 401)

    app = FastAPI(dependencies=[Depends(authorized)])

    @app.exception_handler(Refused)
    async def refused(_: Request, refusal: Refused) -> JSONResponse:
        return JSONResponse({"error": refusal.error}, refusal.status)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": Refused(str(error.errors())).error}, 400)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": stand_in.name, "object": "model", "created": 0, "owned_by": "vllm", "root": stand_in.name}
        return {"object": "list", "data": [card | {"parent": None, "max_model_len": stand_in.max_model_len}]}

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest) -> Any:
        if stand_in.refuse_with is not None:
            raise Refused("as the test wants it", stand_in.refuse_with)
        embeddings = stand_in.check(asked)
        stand_in.asked.append(asked)
        stand_in.embeddings.append(embeddings)
        body = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": stand_in.name}
        if not asked.stream:
            made = list(stand_in.tokens(asked, embeddings))
            usage = {"prompt_tokens": len(embeddings), "completion_tokens": len(made)}
            usage["total_tokens"] = sum(usage.values())
            return body | {"choices": [stand_in.choice(asked, made)], "usage": usage}

        async def events() -> AsyncIterator[str]:
            stand_in.begun += 1
            try:
                for number, token in enumerate(stand_in.tokens(asked, embeddings)):
                    if number == stand_in.break_after:
                        raise RuntimeError("the connection breaks, as the test wants it")
                    if number == stand_in.error_after:
                        error = {"message": "EngineCore died", "type": "InternalServerError", "code": 500}
                        yield f"data: {json.dumps({'error': error})}\n\n"
                        break
                    await asyncio.sleep(stand_in.seconds_a_token)
                    made = stand_in.choice(asked, [token])
                    pieces = [made]
                    if stand_in.bare_finish and made["finish_reason"] is not None:
                        pieces = [
                            made | {"finish_reason": None},
                            made | {"text": "", "token_ids": [], "logprobs": None},
                        ]
                    for piece in pieces:
                        yield f"data: {json.dumps(body | {'choices': [piece]})}\n\n"
                yield "data: [DONE]\n\n"
            except (asyncio.CancelledError, GeneratorExit):
                stand_in.left += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@contextmanager
def serve_stand_in(stand_in: StandIn, port: int = 0) -> Iterator[str]:
    """Run the server in a thread; its address, without a path."""
    server = uvicorn.Server(uvicorn.Config(make_app(stand_in), host="127.0.0.1", port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the stand-in did not start"
            thread.join(0.01)
        number = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{number}"
    finally:
        server.should_exit = True
        thread.join(10)

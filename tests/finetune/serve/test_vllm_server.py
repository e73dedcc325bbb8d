"""What is asked of a vLLM server, by a stand-in that takes what vLLM's request model takes; and what it may answer."""

import asyncio
import dataclasses
from contextlib import aclosing

import pytest
import torch
from recipes_for_tests import IMAGES, TINY
from vllm_stand_in import StandIn, serve_stand_in

from finetune.errors import UserError
from finetune.export.export import export
from finetune.export.qwen2_prompt_embeddings import PromptEncoder, encoded_for_server
from finetune.replies.sampling import Sampling
from finetune.serve.vllm_completions import StreamError, completion_request, read_event
from finetune.serve.vllm_server import Body, ServerFailed, VllmServer
from finetune.terminal import say_nothing
from qwenvl import load_model

STOP = 151645
ASKED = [
    {"role": "user", "content": [{"type": "image", "image": str(IMAGES[0])}, {"type": "text", "text": "What is it?"}]}
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(str(TINY), "qwen2", out=tmp_path_factory.mktemp("exported") / "qwen2", say=say_nothing)


@pytest.fixture(scope="module")
def encoder(exported):
    return PromptEncoder(exported)


@pytest.fixture(scope="module")
def running(exported):
    stand_in = StandIn(exported)
    with serve_stand_in(stand_in) as address:
        yield stand_in, address


@pytest.fixture
def stand_in(running):
    """The stand-in, without faults."""
    server = running[0]
    fresh = {one.name: one.default for one in dataclasses.fields(StandIn) if one.default is not dataclasses.MISSING}
    for name, value in fresh.items():
        setattr(server, name, value)
    server.asked.clear()
    server.embeddings.clear()
    return server


@pytest.fixture
def server(running, stand_in):
    return VllmServer(running[1])


def pieces_of(server, request, most=None):
    """The pieces of a streamed reply, closed after so many."""

    async def read():
        async with server.opened() as streams, aclosing(streams.pieces(Body(request))) as pieces:
            read = []
            async for piece in pieces:
                read.append(piece)
                if len(read) == most:
                    break
            return read

    return asyncio.run(read())


def request(server, embeddings, **settings):
    settings = {"max_new_tokens": 8, "stop_ids": (STOP,)} | settings
    return completion_request(server.what_is_served().name, encoded_for_server(embeddings), **settings)


@torch.inference_mode()
def test_a_reply_with_an_image_is_the_models_own(server, stand_in, encoder):
    prompt = encoder(ASKED)
    pieces = pieces_of(server, request(server, prompt.embeddings[0]))
    ours = load_model(TINY)
    pixels = encoder.processor.image_processor(str(IMAGES[0]), return_tensors="pt")["pixel_values"]
    expected = ours.generate(input_ids=prompt.input_ids, pixel_values=pixels, max_new_tokens=8, do_sample=False)
    assert [token for piece in pieces for token in piece.ids] == expected[0, prompt.input_ids.shape[1] :].tolist()
    assert [piece.finish for piece in pieces] == [None] * 7 + ["length"]
    [asked], [embeddings] = stand_in.asked, stand_in.embeddings
    assert torch.equal(embeddings, prompt.embeddings[0]) and embeddings.dtype == ours.dtype
    assert (asked.max_tokens, asked.temperature, asked.stop_token_ids, asked.ignore_eos) == (8, 0, [STOP], True)


def test_every_setting_is_given(server, stand_in, encoder):
    """What is left out would come from the generation_config.json of the folder."""
    embeddings = encoder(ASKED).embeddings[0]
    sampling = Sampling(temperature=0.7, top_p=0.9, seed=5, logprobs=2)
    pieces_of(server, request(server, embeddings, sampling=sampling, max_new_tokens=2))
    [asked] = stand_in.asked
    assert (asked.temperature, asked.top_p, asked.seed, asked.logprobs) == (0.7, 0.9, 5, 2)
    assert (asked.top_k, asked.min_p, asked.repetition_penalty) == (0, 0.0, 1.0)
    stand_in.asked.clear()
    pieces_of(server, request(server, embeddings, sampling=Sampling(temperature=0.7, top_p=0), max_new_tokens=1))
    assert (stand_in.asked[0].temperature, stand_in.asked[0].top_p) == (0, 1)
    assert (asked.presence_penalty, asked.frequency_penalty, asked.n) == (0.0, 0.0, 1)


def test_a_stop_token_ends_a_reply(server, encoder):
    embeddings = encoder(ASKED).embeddings[0]
    [first, second, *_] = pieces_of(server, request(server, embeddings))
    ended = pieces_of(server, request(server, embeddings, stop_ids=second.ids))
    assert [piece.ids for piece in ended] == [first.ids, second.ids]
    assert ended[-1].finish == "stop"


def test_log_probabilities_are_of_ids(server, encoder):
    prompt = encoder(ASKED)
    [piece] = pieces_of(server, request(server, prompt.embeddings[0], max_new_tokens=1, sampling=Sampling(logprobs=3)))
    with torch.inference_mode():
        ours = load_model(TINY)
        features = encoder.processor.image_processor(str(IMAGES[0]), return_tensors="pt")["pixel_values"]
        likely = ours(input_ids=prompt.input_ids, pixel_values=features).logits[0, -1].log_softmax(-1)
    values, ids = likely.topk(3)
    assert [one.id for one in piece.top_logprobs[0]] == ids.tolist()
    assert [one.logprob for one in piece.top_logprobs[0]] == pytest.approx(values.tolist(), abs=1e-4)
    assert piece.logprobs[0] == piece.top_logprobs[0][0]


def test_closing_a_stream_ends_the_work_there(server, stand_in, encoder):
    stand_in.seconds_a_token = 0.05
    pieces = pieces_of(server, request(server, encoder(ASKED).embeddings[0], max_new_tokens=500), most=2)
    assert len(pieces) == 2
    for _ in range(200):
        if stand_in.left:
            break
        asyncio.run(asyncio.sleep(0.02))
    assert stand_in.left == 1


def test_its_model_is_known_by_its_embeddings(server, stand_in, encoder):
    ids = encoder.processor.tokenizer.encode_text("The total is")
    embeddings = encoder.embed(torch.tensor([ids]), None)[0]
    name = server.what_is_served().name
    server.check_embeddings(name, ids, embeddings)
    with pytest.raises(UserError, match="another model than the folder here"):
        server.check_embeddings(name, ids, embeddings.roll(1, dims=1))
    stand_in.takes_embeddings = False
    with pytest.raises(ServerFailed, match="--enable-prompt-embeds"):
        server.check_embeddings(name, ids, embeddings)


@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [
        ({"refuse_with": 500}, "upstream", "answers 500: as the test wants it"),
        ({"refuse_with": 503}, "unreachable", "answers 503"),
        ({"error_after": 1}, "upstream", "EngineCore died"),
        ({"break_after": 1}, "upstream", "broke off"),
        ({"key": "secret"}, "upstream", "answers 401: Unauthorized. Give its key by --at-key-file"),
        ({"max_model_len": 20}, "upstream", "maximum context length is 20"),
    ],
)
def test_what_fails_there_is_said(server, stand_in, encoder, fault, cause, words):
    asked = request(server, encoder(ASKED).embeddings[0])
    for name, value in fault.items():
        setattr(stand_in, name, value)
    with pytest.raises(ServerFailed, match=words) as failed:
        pieces_of(server, asked)
    assert failed.value.cause == cause


def test_a_key_is_sent(running, stand_in, encoder):
    stand_in.key = "secret"
    server = VllmServer(f"{running[1]}/v1/", "secret")
    assert pieces_of(server, request(server, encoder(ASKED).embeddings[0]))


def test_no_server_is_said_with_what_to_do():
    with pytest.raises(ServerFailed, match="start it with `vllm serve FOLDER --enable-prompt-embeds`") as failed:
        VllmServer("http://127.0.0.1:9").what_is_served()
    assert failed.value.cause == "unreachable"


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc", "http://", "http://host/v1?x=1"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UserError, match="no address"):
        VllmServer(url)


@pytest.mark.parametrize(
    "event",
    ["", "[]", "null", '{"choices": [{"text": "a", "finish_reason": "abort"}]}', '{"choices": 1}']
    + ['{"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [0], "top_logprobs": []}}]}'],
)
def test_an_event_of_another_form_is_an_error(event):
    with pytest.raises(StreamError):
        read_event(event)


def test_an_event_without_choices_says_nothing_of_the_reply():
    assert read_event('{"choices": [], "usage": {"prompt_tokens": 3}}') is None

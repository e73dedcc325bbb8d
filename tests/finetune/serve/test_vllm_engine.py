"""The engine before a vLLM server replies as our own model does, and ends there what nobody wants any more."""

import dataclasses
import queue
import time

import pytest
import torch
from recipes_for_tests import IMAGES, TINY
from vllm_stand_in import StandIn, serve_stand_in

from finetune.batches.image_request import ImageRequest
from finetune.errors import UserError
from finetune.export.export import export
from finetune.export.qwen2_prompt_embeddings import PromptEncoder
from finetune.replies.decoder import PromptRow
from finetune.replies.reply_text import reply_text
from finetune.replies.running_batch import ReplyRequest, RunningBatch
from finetune.replies.sampling import GREEDY, Sampling
from finetune.replies.torch_decoder import TorchDecoder
from finetune.serve.asked import Asked, ChoiceToken, Ended, EngineClosed, QueueFull, Refused, Usage
from finetune.serve.vllm_engine import VllmEngine
from finetune.serve.vllm_server import VllmServer
from finetune.terminal import say_nothing
from qwenvl import ImageAccess, load_model
from qwenvl.text.chat import render_chat

NEVER = (999_999,)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(str(TINY), "qwen2", out=tmp_path_factory.mktemp("exported") / "qwen2", say=say_nothing)


@pytest.fixture(scope="module")
def running(exported):
    stand_in = StandIn(exported)
    with serve_stand_in(stand_in) as address:
        yield stand_in, address


@pytest.fixture
def stand_in(running):
    """The stand-in, without faults."""
    server = running[0]
    for one in dataclasses.fields(StandIn):
        if one.default is not dataclasses.MISSING:
            setattr(server, one.name, one.default)
    return server


@pytest.fixture(scope="module")
def encoder(exported):
    return PromptEncoder(exported)


def engine_before(server, encoder, **settings):
    settings = {"context": 2048, "max_open": 4, "keep_feature_bytes": 0} | settings
    return VllmEngine(server, server.what_is_served().name, encoder, **settings)


@pytest.fixture
def engine(running, encoder, stand_in):
    server = VllmServer(running[1])
    engine = engine_before(server, encoder, keep_feature_bytes=10**6)
    yield engine
    engine.close(0)


def asked(encoder, images=(), text="What is it?", **settings):
    parts = [{"type": "image", "image": str(image)} for image in images] + [{"type": "text", "text": text}]
    rendered = render_chat(
        [{"role": "user", "content": parts}], encoder.processor.tokenizer, add_generation_prompt=True
    )
    requests = [ImageRequest(image.read_bytes(), ImageAccess(), "an image") for image in images]
    return Asked(rendered.ids, **({"max_new_tokens": 12, "stop_ids": NEVER, "images": requests} | settings))


class Events:
    """Takes what an engine hands out."""

    def __init__(self):
        self.queue = queue.SimpleQueue()

    def all(self):
        """All events, once the last has come."""
        events = [self.queue.get(timeout=20)]
        while isinstance(events[-1], ChoiceToken):
            events.append(self.queue.get(timeout=20))
        return events


def events_of(engine, request):
    events = Events()
    engine.submit(request, events.queue.put)
    return events.all()


def text_of(events, choice=0):
    return "".join(event.token.text for event in events[:-1] if event.choice == choice)


def until(done):
    for _ in range(500):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError("it has not come")


@torch.no_grad()
def of_our_batch(encoder, request):
    """The tokens that our own batch gives for the same."""
    model = load_model(TINY).eval()
    pixels = [encoder.processor.image_processor(image.source, return_tensors="pt") for image in request.images]
    features = [model.get_image_features(one["pixel_values"])[0] for one in pixels]
    batch = RunningBatch(TorchDecoder(model), encoder.processor.tokenizer)
    row = PromptRow(request.ids, features, [str(number) for number in range(len(features))])
    reply = ReplyRequest(row, request.max_new_tokens, request.stop_ids, request.stop_texts, request.sampling)
    _, tokens = batch.join([reply])
    while len(batch):
        tokens += batch.step()
    return tokens


def same(events, tokens):
    """Whether events have these tokens, log-probabilities to 1e-4."""

    def logprobs(one):
        return [] if one.logprob is None else [one.logprob, *one.top_logprobs]

    made = [event.token for event in events[:-1]]
    assert [(one.id, one.text, one.finish) for one in made] == [(one.id, one.text, one.finish) for one in tokens]
    found = [[(value.id, value.logprob) for value in logprobs(one)] for one in made]
    assert found == [[(value.id, pytest.approx(value.logprob, abs=1e-4)) for value in logprobs(one)] for one in tokens]


@pytest.mark.parametrize("images", [0, 1, 2])
def test_replies_are_those_of_our_own_batch(engine, encoder, images):
    request = asked(encoder, IMAGES[:images], sampling=Sampling(logprobs=3))
    events = events_of(engine, request)
    same(events, of_our_batch(encoder, request))
    assert events[-1] == Ended(Usage(len(request.ids), 12, 0))


def test_a_stop_token_and_a_stop_text_end_a_reply_as_in_our_own_batch(engine, encoder, stand_in):
    whole = of_our_batch(encoder, asked(encoder))
    ids = [token.id for token in whole]
    by_token = asked(encoder, stop_ids=(next(one for one in ids[3:] if one not in ids[:3]),))
    same(events_of(engine, by_token), of_our_batch(encoder, by_token))
    text = reply_text(encoder.processor.tokenizer, ids)
    by_text = asked(encoder, stop_texts=(text[len(text) // 2 :][:3],), max_new_tokens=400)
    tokens = of_our_batch(encoder, by_text)
    assert tokens[-1].finish == "stop" and len(tokens) < 13
    stand_in.seconds_a_token, left = 0.02, stand_in.left
    same(events_of(engine, by_text), tokens)
    until(lambda: stand_in.left == left + 1)  # the work there is ended, too


def test_an_end_without_a_token_ends_a_reply(engine, encoder, stand_in):
    stand_in.bare_finish = True
    tokens = of_our_batch(encoder, asked(encoder))
    events = events_of(engine, asked(encoder))
    assert [one.token.id for one in events[:-1]] == [*(one.id for one in tokens), None]
    assert text_of(events) == "".join(one.text for one in tokens)
    assert events[-2].token.finish == "length" and events[-1].usage.completion == 12


def test_several_replies_are_drawn_with_seeds_of_their_own(engine, encoder, stand_in):
    stand_in.asked.clear()
    events = events_of(engine, asked(encoder, n=3, sampling=Sampling(temperature=1.0, seed=7)))
    seeds = {one.seed for one in stand_in.asked}
    assert len(seeds) == 3 and seeds & {7, 8, 9} == {7}, "none of the others is what another request may give"
    assert len({text_of(events, choice) for choice in range(3)}) == 3
    assert events[-1].usage.completion == 36
    stand_in.asked.clear()
    for seed in (2**63 - 1, -(2**63)):
        events_of(engine, asked(encoder, n=2, sampling=Sampling(temperature=1.0, seed=seed)))
    seeds = {one.seed for one in stand_in.asked}
    assert len(seeds) == 4 and {2**63 - 1, -(2**63)} < seeds


def test_an_image_is_encoded_once(engine, encoder):
    for text in ("What is it?", "And this?"):
        events_of(engine, asked(encoder, IMAGES[:1], text, max_new_tokens=1))
    assert (engine.state.pictures, engine.state.pictures_encoded) == (2, 1)


def test_a_request_that_is_cancelled_is_ended_there(engine, encoder, stand_in):
    stand_in.seconds_a_token, left, events = 0.02, stand_in.left, Events()
    ticket = engine.submit(asked(encoder, max_new_tokens=500), events.queue.put)
    events.queue.get(timeout=20)
    ticket.cancel()
    until(lambda: stand_in.left == left + 1)
    until(lambda: engine.state.rows == 0)
    while not events.queue.empty():
        assert isinstance(events.queue.get(), ChoiceToken)


@pytest.mark.parametrize(
    ("fault", "cause", "words"),
    [
        ({"refuse_with": 500}, "upstream", "answers 500"),
        ({"refuse_with": 503}, "unreachable", "answers 503"),
        ({"error_after": 3}, "upstream", "EngineCore died"),
        ({"break_after": 3}, "upstream", "broke off"),
    ],
)
def test_what_fails_there_ends_the_request_and_no_other(engine, encoder, stand_in, fault, cause, words):
    for name, value in fault.items():
        setattr(stand_in, name, value)
    events = events_of(engine, asked(encoder))
    assert isinstance(events[-1], Refused) and events[-1].cause == cause and words in events[-1].message
    for name in fault:
        setattr(stand_in, name, None)
    assert isinstance(events_of(engine, asked(encoder))[-1], Ended)


def test_a_server_that_is_gone_is_said(encoder):
    server = VllmServer("http://127.0.0.1:9")
    engine = VllmEngine(server, "any", encoder, context=2048, max_open=4, keep_feature_bytes=0)
    try:
        [refused] = events_of(engine, asked(encoder))
        assert refused.cause == "unreachable" and "vllm serve FOLDER" in refused.message
    finally:
        engine.close(0)


def test_a_deadline_ends_a_request(engine, encoder, stand_in):
    stand_in.seconds_a_token, left = 0.05, stand_in.left
    events = events_of(engine, asked(encoder, max_new_tokens=500, deadline=time.monotonic() + 0.5))
    assert events[-1].cause == "timeout"
    until(lambda: stand_in.left == left + 1)


def test_an_image_that_cannot_be_read_is_the_clients_fault(engine, encoder):
    request = asked(encoder, IMAGES[:1])
    broken = ImageRequest(b"\x89PNG and no more", ImageAccess(), "messages[0].content[0]")
    [refused] = events_of(engine, dataclasses.replace(request, images=[broken]))
    assert refused.cause == "input" and "messages[0].content[0]" in refused.message


def test_what_is_too_long_is_refused_at_once(engine, encoder):
    with pytest.raises(UserError, match="the model takes 2,048 together"):
        engine.submit(asked(encoder, max_new_tokens=2048), print)


def test_more_replies_than_are_made_at_once_are_refused(engine, encoder):
    with pytest.raises(UserError, match="5 replies are asked for, and at most 4 are made at once"):
        engine.submit(asked(encoder, n=5), print)


def test_no_more_are_open_than_may_be(engine, encoder, stand_in):
    stand_in.seconds_a_token = 0.05
    tickets = [engine.submit(asked(encoder, max_new_tokens=500), lambda _: None) for _ in range(4)]
    with pytest.raises(QueueFull):
        engine.submit(asked(encoder), print)
    tickets[0].cancel()
    until(lambda: not engine.is_full)
    tickets.append(engine.submit(asked(encoder), lambda _: None))
    for ticket in tickets:
        ticket.cancel()


def test_closing_lets_finish_and_then_ends(running, encoder, stand_in):
    server = VllmServer(running[1])
    engine = engine_before(server, encoder)
    stand_in.seconds_a_token = 0.02
    short, long = Events(), Events()
    engine.submit(asked(encoder, max_new_tokens=5, sampling=GREEDY), short.queue.put)
    engine.submit(asked(encoder, max_new_tokens=500), long.queue.put)
    engine.close(1.0)
    assert isinstance(short.all()[-1], Ended)
    assert long.all()[-1].cause == "closing"
    with pytest.raises(EngineClosed):
        engine.submit(asked(encoder), print)

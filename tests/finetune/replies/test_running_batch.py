"""Replies that join and leave a running batch are those of `generate` alone."""

import random

import pytest
import torch
from recipes_for_tests import IMAGES
from replies_for_tests import alone, row

from finetune.errors import UserError
from finetune.replies.decoder import PromptRow
from finetune.replies.reply_text import reply_text
from finetune.replies.running_batch import NewToken, ReplyRequest, RunningBatch
from finetune.replies.sampling import Sampling
from finetune.replies.torch_decoder import TorchDecoder


@pytest.fixture
def rows(tiny_model, tiny_processor):
    """Different lengths with none, one or two images; two are longer than seq_length (700)."""
    a, b, c, *_ = IMAGES
    asked = [
        ("What is it?", (a,)),
        ("How many are there of them, all in all?", (a,)),
        ("Hello", ()),
        ("long " * 180, (b,)),
        ("Who signed here, and when was that?", (b, c)),
        ("long " * 240, ()),
        ("What?", (c,)),
        ("x", ()),
    ]
    return [row(tiny_model, tiny_processor, text, *images) for text, images in asked]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_join_and_leave_in_any_order(tiny_model, tiny_processor, rows, seed):
    dice = random.Random(seed)
    lengths = [dice.randint(1, 12) for _ in rows]
    batch = RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer)
    waiting, made, index_of = list(range(len(rows))), {}, {}
    dice.shuffle(waiting)
    while waiting or len(batch):
        joining = [waiting.pop() for _ in range(min(len(waiting), dice.randint(0, 3)))]
        if joining:
            numbers, new = batch.join([ReplyRequest(rows[index], lengths[index], ()) for index in joining])
            index_of |= dict(zip(numbers, joining, strict=True))
        else:
            new = batch.step()
        for token in new:
            made.setdefault(index_of[token.reply], []).append(token.id)
            assert (token.finish == "length") == (len(made[index_of[token.reply]]) == lengths[index_of[token.reply]])
    assert made == {index: alone(tiny_model, one, lengths[index]) for index, one in enumerate(rows)}


def run(batch: RunningBatch, requests: list[ReplyRequest]) -> list[list[NewToken]]:
    """All that comes of requests that join together, for each of them."""
    numbers, new = batch.join(requests)
    made = {number: [] for number in numbers}
    while new:
        for token in new:
            made[token.reply].append(token)
        new = batch.step()
    return list(made.values())


def test_stops_choices_and_shortest_replies(tiny_model, tiny_processor, rows):
    """Each request its own, beside others; the pieces are the text."""
    tokenizer = tiny_processor.tokenizer
    free = [alone(tiny_model, one, 10) for one in rows]
    texts = [reply_text(tokenizer, ids) for ids in free]
    stop = texts[1][3:5]
    assert stop.strip() == stop
    batch = RunningBatch(TorchDecoder(tiny_model), tokenizer)
    made = run(
        batch,
        [
            ReplyRequest(rows[0], 10, (free[0][4],)),
            ReplyRequest(rows[1], 10, (), stop_texts=(stop,)),
            ReplyRequest(rows[2], 10, (free[2][0],), min_new_tokens=4),
            ReplyRequest(rows[3], 1, (), choices=(33, 34, 35)),
            ReplyRequest(rows[4], 10, ()),
        ],
    )
    ids = [[token.id for token in tokens if token.id is not None] for tokens in made]
    told = ["".join(token.text for token in tokens) for tokens in made]
    assert ids[0] == free[0][: free[0].index(free[0][4])] and made[0][-1].finish == "stop"
    assert told[1] == texts[1].partition(stop)[0] and made[1][-1].finish == "stop" and len(ids[1]) < 10
    assert len(ids[2]) >= 4 and free[2][0] not in ids[2]
    assert ids[3][0] in (33, 34, 35) and made[3][0].finish == "length"
    assert ids[4] == free[4] and told[4] == texts[4] and made[4][-1].finish == "length"
    assert all(token.finish is None for tokens in made for token in tokens[:-1]) and len(batch) == 0


def test_a_seed_gives_the_same_reply_whatever_is_beside_it(tiny_model, tiny_processor, rows):
    def reply(batch, index, seed, others=()):
        sampling = Sampling(1.0, 0.95, seed=seed)
        requests = [ReplyRequest(rows[n], 6, (), sampling=Sampling(2.0)) for n in others]
        tokens = run(batch, [*requests, ReplyRequest(rows[index], 8, (), sampling=sampling)])[-1]
        return [token.id for token in tokens]

    batch = RunningBatch(TorchDecoder(tiny_model, prefix_bytes=10**8), tiny_processor.tokenizer)
    state = torch.get_rng_state()
    first = reply(batch, 0, 5)
    assert reply(batch, 0, 5, others=(1, 2, 3)) == first == reply(batch, 0, 5, others=(7,))
    assert len({tuple(reply(batch, 0, seed)) for seed in range(4)}) == 4
    several = [ReplyRequest(rows[0], 8, (), sampling=Sampling(1.0, 0.95, seed=5).nth(n)) for n in range(4)]
    made = [[token.id for token in tokens] for tokens in run(batch, several)]
    assert made[0] == first and len({tuple(ids) for ids in made}) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_log_probabilities_are_the_models_own(tiny_model, tiny_processor, rows):
    """Of the token that came, whatever drew it, and of the likeliest; also of a stop token."""
    one = rows[2]
    batch = RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer)
    (tokens,) = run(batch, [ReplyRequest(one, 5, (), sampling=Sampling(3.0, seed=1, logprobs=3))])
    ids = torch.tensor([[*one.ids, *(token.id for token in tokens)]])
    with torch.no_grad():
        expected = tiny_model(input_ids=ids).logits[0, len(one.ids) - 1 : -1].float().log_softmax(-1)
    for token, right in zip(tokens, expected, strict=True):
        assert token.logprob.id == token.id
        assert token.logprob.logprob == pytest.approx(float(right[token.id]), abs=1e-4)
        top = right.topk(3)
        assert [other.id for other in token.top_logprobs] == top.indices.tolist()
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
    stop = alone(tiny_model, one, 1)[0]
    (tokens,) = run(batch, [ReplyRequest(one, 5, (stop,), sampling=Sampling(logprobs=0))])
    assert [token.id for token in tokens] == [None] and tokens[0].logprob.id == stop and not tokens[0].top_logprobs


@pytest.mark.parametrize("call", ["join", "step"])
def test_a_failure_leaves_the_others_as_they_were(tiny_model, tiny_processor, rows, call):
    """Out of memory in any layer's growth or forward: the same call again, or without the new one, goes on."""
    batch = RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer)
    numbers, new = batch.join([ReplyRequest(one, 8, ()) for one in rows[:3]])
    made = {number: [token.id] for number, token in zip(numbers, new, strict=True)}
    block, calls = tiny_model.transformer.h[-1], 0

    def fails_at_times(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls % 2:
            raise torch.OutOfMemoryError("out of memory")
        return type(block).forward(block, *args, **kwargs)

    block.forward = fails_at_times
    while len(batch):
        with pytest.raises(torch.OutOfMemoryError):
            batch.step() if call == "step" else batch.join([ReplyRequest(rows[5], 8, ())])
        assert len(batch) <= 3
        calls = 1
        for token in batch.step():
            made[token.reply].append(token.id)
        calls = 0
    del block.forward
    assert list(made.values()) == [alone(tiny_model, one, 8) for one in rows[:3]]


def test_a_step_whose_tokens_cannot_be_chosen_is_not_computed_twice(tiny_model, tiny_processor, rows, monkeypatch):
    """Memory may be short after the forward too, while replies leave and join before the next try."""
    samplings = [Sampling(), Sampling(1.0, seed=1), Sampling(0.8, 0.9, seed=2), Sampling(logprobs=1)]
    wanted = [ReplyRequest(one, 8, (), sampling=how) for one, how in zip(rows[:4], samplings, strict=True)]
    expected = run_beside(RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer), wanted)
    module, out_of_memory = "finetune.replies.running_batch", torch.OutOfMemoryError("out of memory")
    batch = RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer)
    numbers, new = batch.join(wanted[:3])
    made = {number: [token.id] for number, token in zip(numbers, new, strict=True)}

    def fails(call):
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(f"{module}._logprobs", lambda *_: (_ for _ in ()).throw(out_of_memory))
            call()

    def step():
        for token in batch.step():
            made[token.reply].append(token.id)

    step()
    fails(batch.step)
    fails(lambda: batch.join(wanted[3:]))
    fails(batch.step)
    batch.leave(numbers[:1])
    late, (first,) = batch.join(wanted[3:])
    made[late[0]] = [first.id]
    step()
    assert [len(ids) for ids in made.values()] == [2, 3, 3, 1]
    fails(batch.step)
    batch.leave(numbers[1:2])
    while len(batch):
        step()
    assert [len(ids) for ids in made.values()] == [2, 3, 8, 8]
    assert list(made.values()) == [ids[: len(own)] for ids, own in zip(expected, made.values(), strict=True)]


def test_a_prompt_without_room_and_a_reply_that_fills_the_context(tiny_model, tiny_processor, rows):
    length = len(rows[2].ids)
    batch = RunningBatch(TorchDecoder(tiny_model, context=length + 3), tiny_processor.tokenizer)
    with pytest.raises(UserError, match=f"has {len(rows[0].ids):,} tokens, and the model takes {length + 3:,}"):
        batch.join([ReplyRequest(rows[2], 8, ()), ReplyRequest(rows[0], 8, ())])
    with pytest.raises(UserError, match="the prompt is empty"):
        batch.join([ReplyRequest(rows[2], 8, ()), ReplyRequest(PromptRow([]), 8, ())])
    assert len(batch) == 0
    (tokens,) = run(batch, [ReplyRequest(rows[2], 8, ())])
    assert [token.id for token in tokens] == alone(tiny_model, rows[2], 3) and tokens[-1].finish == "length"


def test_replies_that_nobody_wants_leave(tiny_model, tiny_processor, rows):
    batch = RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer)
    numbers, _ = batch.join([ReplyRequest(one, 5, ()) for one in rows[:4]])
    batch.leave([numbers[0], numbers[2], 999])
    assert [token.reply for token in batch.step()] == [numbers[1], numbers[3]]
    batch.leave(numbers)
    assert batch.step() == [] and len(batch) == 0


@pytest.mark.parametrize("attention", ["eager", "varlen"])
def test_other_attentions(tiny_model, tiny_processor, rows, attention):
    tiny_model.set_attn_implementation(attention)
    batch = RunningBatch(TorchDecoder(tiny_model), tiny_processor.tokenizer)
    batch.join([ReplyRequest(rows[3], 5, ())])
    made = run_beside(batch, [ReplyRequest(one, 4, ()) for one in (rows[0], rows[1], rows[2])])
    assert made == [alone(tiny_model, one, 4) for one in (rows[0], rows[1], rows[2])]


def run_beside(batch: RunningBatch, requests: list[ReplyRequest]) -> list[list[int]]:
    """The replies to requests that join others."""
    numbers, new = batch.join(requests)
    made = {number: [] for number in numbers}
    while new:
        for token in new:
            if token.reply in made:
                made[token.reply].append(token.id)
        new = batch.step()
    return list(made.values())

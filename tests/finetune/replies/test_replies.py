"""Replies in batches are those of one prompt at a time."""

import itertools
from dataclasses import replace

import pytest
import torch
from recipes_for_tests import IMAGES

from finetune.batches.budget import ENCODED_TOGETHER
from finetune.batches.image_request import ImageRequest, image_key
from finetune.errors import Failed
from finetune.replies.image_features import ImageStore
from finetune.replies.replies import Decoding, Plan, Prompt, generate_replies, plan_replies, stop_ids_of
from finetune.replies.reply_text import stop_place
from finetune.replies.running_batch import RunningBatch
from qwenvl import ImageAccess
from qwenvl.images.images import ImageError
from qwenvl.text.chat import render_chat, render_prompt

NEW = 10


def prompt(processor, text: str, *images, name: str = "rows.jsonl, row 1") -> Prompt:
    parts = [{"type": "image", "image": source} for source in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    rendered = render_chat(messages, processor.tokenizer, add_generation_prompt=True, n_queries=processor.n_queries)
    return Prompt(rendered.ids, rendered.images, ImageAccess(), name)


@pytest.fixture
def prompts(tiny_processor):
    """Rows of different lengths with none, one or two images, out of four; two are longer than seq_length (700)."""
    files = [str(file) for file in IMAGES[:4]]
    pages = itertools.cycle([files[:1], [], files[1:3], files[:1], files[3:], [files[1], files[1]]])
    rows = [prompt(tiny_processor, f"What is number {n}? " * (1 + n % 4), *next(pages)) for n in range(12)]
    rows[3] = prompt(tiny_processor, "long " * 180, files[0])
    rows[7] = prompt(tiny_processor, "long " * 240)
    return rows


def decoding(model, **changes) -> Decoding:
    return Decoding(**{"max_new_tokens": NEW, "stop_ids": (), **changes})


def replies(model, processor, prompts, settings, **options):
    plan = plan_replies(prompts)
    made = generate_replies(model, prompts, plan, processor.tokenizer, processor.image_processor, settings, **options)
    return {reply.index: reply for reply in made}


def one_at_a_time(model, processor, prompt: Prompt, stop_ids=None) -> list[int]:
    ids = torch.tensor([prompt.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs |= processor.image_processor(list(prompt.images), do_normalize=False, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=stop_ids)
    return new[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("batch_tokens", [1, 2600, 100_000])
def test_a_batch_equals_one_at_a_time(tiny_model, tiny_processor, prompts, batch_tokens):
    together = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model, batch_tokens=batch_tokens))
    assert sorted(together) == list(range(len(prompts)))
    assert sum(len(row.ids) > tiny_model.config.seq_length for row in prompts) == 2
    alone = [one_at_a_time(tiny_model, tiny_processor, row) for row in prompts]
    assert [list(together[index].ids) for index in range(len(prompts))] == alone
    assert len({tuple(ids) for ids in alone}) > 3


def test_images_matter(tiny_model, tiny_processor):
    """The rows of a batch get their own images: with another one, the reply's logits differ."""
    rows = [prompt(tiny_processor, "What is it?", str(file)) for file in IMAGES]
    features = []
    forward = tiny_model.forward
    tiny_model.forward = lambda **inputs: features.append(inputs.get("image_features")) or forward(**inputs)
    replies(tiny_model, tiny_processor, rows, decoding(tiny_model))
    assert len(features) == NEW and features[0].shape[0] == len(IMAGES) and set(features[1:]) == {None}
    pixels = tiny_processor.image_processor([str(file) for file in IMAGES], do_normalize=False, return_tensors="pt")
    expected = tiny_model.get_image_features(pixels["pixel_values"])
    assert torch.allclose(features[0], expected, atol=1e-5)


def test_replies_end_at_each_stop_id(tiny_model, tiny_processor, prompts):
    free = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model))
    stop = free[0].ids[4]
    ended = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model, stop_ids=(stop, 3)))
    for index, reply in ended.items():
        whole = free[index].ids
        ends = [place for place, token in enumerate(whole) if token in (stop, 3)]
        assert reply.ids == whole[: ends[0] if ends else NEW]
    assert len(ended[0].ids) <= 4


def test_replies_end_at_a_stop_text(tiny_model, tiny_processor, prompts):
    free = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model))
    text = free[2].text
    stop = text[2:5]
    ended = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model, stop_texts=(stop,)))
    for index, reply in ended.items():
        assert reply.text == free[index].text.partition(stop)[0]
    assert stop in text and len(ended[2].ids) < NEW


def test_white_space_before_a_reply_does_not_end_it():
    assert stop_place("\n 12.50\nQuestion", ("\n", "Question")) == 7
    assert stop_place("\n\n", ("\n",)) is None
    assert stop_place("12.50 Question:", ("\n", "Question:")) == 6


def test_stop_ids_are_the_configs_and_those_of_the_style(tiny_model, tiny_processor):
    tokenizer = tiny_processor.tokenizer
    turns = {tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id}
    assert set(stop_ids_of(tiny_model, tokenizer)) == turns == set(tiny_model.generation_config.eos_token_id)
    # A base checkpoint: its config names the end of text only, or nothing.
    for eos in (tokenizer.eod_id, None):
        tiny_model.generation_config.eos_token_id = eos
        assert set(stop_ids_of(tiny_model, tokenizer, "chat")) == turns
        assert stop_ids_of(tiny_model, tokenizer, "base") == (tokenizer.eod_id,)


def test_each_image_is_encoded_once(tiny_model, tiny_processor, prompts, monkeypatch):
    """Also with room for the features of a single image, and where the same file comes as bytes in several rows."""
    data = IMAGES[4].read_bytes()
    prompts += [prompt(tiny_processor, f"Number {n}?", {"bytes": data, "path": None}) for n in range(3)]
    visual, encoded = tiny_model.transformer.visual, []
    forward = visual.forward
    monkeypatch.setattr(visual, "forward", lambda pixels: encoded.append(len(pixels)) or forward(pixels))
    full = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model, batch_rows=2))
    assert sum(encoded) == 5 and max(encoded) <= ENCODED_TOGETHER
    small = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model, batch_rows=2), keep_bytes=1)
    assert small == full


def test_features_that_went_are_made_again(tiny_model, tiny_processor):
    rows = [prompt(tiny_processor, "?", str(file)) for file in IMAGES[:3]]
    requests = {}
    for row in rows:
        key = image_key(row.images[0], row.access)
        requests[key] = ImageRequest(row.images[0], row.access, row.name)
    with ImageStore(tiny_model, tiny_processor.image_processor, keep_bytes=1) as store:
        first = {key: store.features({key: request})[key] for key, request in requests.items()}
        assert store.encoded == 3
        again = store.features(requests)
        assert store.encoded == 5  # the last of the three was still there
    assert all(torch.allclose(first[key], again[key], atol=1e-5) for key in requests)


def test_questions_on_one_page_share_a_window(tiny_processor):
    """Pages of very different questions are not torn apart by the order of lengths."""
    plan = Plan()
    for index in range(40):
        plan.images.append((index % 10,))
        plan.lengths.append(300 + 37 * index % 101)
    windows = plan.order(images_at_once=3)
    assert sorted(index for window in windows for index in window) == list(range(40))
    pages = [{plan.images[index] for index in window} for window in windows]
    assert [len(page) for page in pages] == [3, 3, 3, 1]
    assert not any(first & second for first, second in itertools.combinations(pages, 2))
    for window in windows:
        for place, index in enumerate(window):
            assert plan.lengths[index] <= plan.lengths[window[0]]
            # Questions on one page are neighbours.
            same = [other for other, found in enumerate(window) if plan.images[found] == plan.images[index]]
            assert max(same) - min(same) == len(same) - 1 and place in same


def watch_rows(model) -> list[tuple[int, int]]:
    """Gets the rows and columns of each decoding step, as they come."""
    shapes, forward = [], model.forward

    def watched(**inputs):
        if inputs["input_ids"].shape[1] == 1:
            shapes.append((len(inputs["input_ids"]), inputs["past_key_values"].width))
        return forward(**inputs)

    model.forward = watched
    return shapes


def test_batches_keep_to_their_budget(tiny_model, tiny_processor, prompts):
    shapes = watch_rows(tiny_model)
    replies(tiny_model, tiny_processor, prompts, decoding(tiny_model, batch_tokens=1500, batch_rows=3))
    assert sum(rows for rows, _ in shapes) == len(prompts) * (NEW - 1)  # the first token comes with the prompt
    assert all(rows <= 3 and (rows == 1 or rows * columns <= 1500) for rows, columns in shapes)
    assert any(rows == 3 for rows, _ in shapes)


def test_prompts_join_when_others_have_their_replies(tiny_model, tiny_processor, prompts, monkeypatch):
    """Replies that end early make room for others while the rest grows on."""
    free = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model))
    growing, join = [], RunningBatch.join
    monkeypatch.setattr(RunningBatch, "join", lambda batch, new: growing.append(len(batch)) or join(batch, new))
    stops = (free[3].ids[2], free[5].ids[5], free[8].ids[1])
    ended = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model, stop_ids=stops, batch_rows=4))
    for index, reply in ended.items():
        ends = [place for place, token in enumerate(free[index].ids) if token in stops]
        assert reply.ids == free[index].ids[: ends[0] if ends else NEW] and reply.cut == (not ends)
    assert len(growing) > 2 and any(growing), "prompts joined replies that were growing"


def test_an_image_that_cannot_be_read(tiny_model, tiny_processor, prompts, tmp_path):
    half = tmp_path / "half.png"
    half.write_bytes(IMAGES[0].read_bytes()[:300])
    prompts[1] = prompt(tiny_processor, "What?", str(IMAGES[0]), str(half), name="rows.jsonl, row 2")
    with pytest.raises(ImageError, match=r"rows.jsonl, row 2.*half.png"):
        replies(tiny_model, tiny_processor, prompts, decoding(tiny_model))
    told = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model), on_bad_image="wrong")
    assert sorted(told) == list(range(len(prompts)))
    assert [index for index, reply in told.items() if reply.unreadable] == [1]
    assert "half.png" in told[1].unreadable and told[1].text == "" and told[1].ids == ()


def test_what_does_not_fit_is_tried_in_smaller_batches(tiny_model, tiny_processor, prompts, caplog):
    expected = replies(tiny_model, tiny_processor, prompts, decoding(tiny_model))
    forward = tiny_model.forward

    def small_memory(**inputs):
        if len(inputs["input_ids"]) * inputs["past_key_values"].width > 1200:
            raise torch.OutOfMemoryError("out of memory")
        return forward(**inputs)

    tiny_model.forward = small_memory
    assert replies(tiny_model, tiny_processor, prompts, decoding(tiny_model)) == expected
    assert "out of memory" in caplog.text
    prompts[0] = prompt(tiny_processor, "long " * 500)
    with pytest.raises(Failed, match="do not fit into the device's memory"):
        replies(tiny_model, tiny_processor, prompts, decoding(tiny_model))


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_of_the_model_is_changed(tiny_model, tiny_processor, prompts, whole):
    tiny_model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.3, repetition_penalty=5.0)
    config, state = tiny_model.generation_config, torch.get_rng_state()
    before = config.to_dict()
    plain = replies(tiny_model.train(), tiny_processor, prompts, decoding(tiny_model))
    made = generate_replies(
        tiny_model.train(), prompts, plan_replies(prompts), tiny_processor.tokenizer,
        tiny_processor.image_processor, decoding(tiny_model),
    )  # fmt: skip
    first = next(made)
    assert first == plain[first.index]
    if whole:
        list(made)
    made.close()
    assert tiny_model.training and tiny_model.generation_config is config and config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    # Neither sampling nor the penalty acted: these are the model's own greedy replies.
    config.update(do_sample=False, temperature=None, top_p=None, repetition_penalty=None)
    assert list(plain[0].ids) == one_at_a_time(tiny_model.eval(), tiny_processor, prompts[0])


def test_raw_prompts_of_the_base_model(tiny_model, tiny_processor):
    content = [{"type": "image", "image": str(IMAGES[0])}, {"type": "text", "text": "What is it? Answer:"}]
    rendered = render_prompt(content, tiny_processor.tokenizer, n_queries=tiny_processor.n_queries)
    raw = Prompt(rendered.ids, rendered.images, ImageAccess(), "row 1")
    found = replies(tiny_model, tiny_processor, [raw], decoding(tiny_model))
    assert list(found[0].ids) == one_at_a_time(tiny_model, tiny_processor, raw)


def test_the_first_token_is_the_likeliest_of_the_choices(tiny_model, tiny_processor):
    """Those of the own row, by the logits of the prompt; batched with others as by itself."""
    choices = [(33, 34, 35), (40, 41), (60, 50, 70, 80)]
    rows = [
        replace(prompt(tiny_processor, f"Question {'x' * n}?", IMAGES[0]), choices=own)
        for n, own in enumerate(choices)
    ]
    made = replies(tiny_model, tiny_processor, rows, decoding(tiny_model, max_new_tokens=1))
    for number, (row, own) in enumerate(zip(rows, choices, strict=True)):
        pixels = tiny_processor.image_processor(list(row.images), do_normalize=False, return_tensors="pt")
        logits = tiny_model(input_ids=torch.tensor([row.ids]), **pixels).logits[0, -1, list(own)]
        assert made[number].ids == (own[int(logits.argmax())],)


def test_a_reply_is_not_shorter_than_asked_and_a_cut_one_is_known(tiny_model, tiny_processor):
    row = prompt(tiny_processor, "What?")

    def reply(**changes):
        return replies(tiny_model, tiny_processor, [row], decoding(tiny_model, **changes))[0]

    free = reply()
    assert free.cut and len(free.ids) == NEW
    first = free.ids[0]
    ended = reply(stop_ids=(first,))
    assert ended.ids == () and not ended.cut
    longer = reply(stop_ids=(first,), min_new_tokens=3)
    assert len(longer.ids) >= 3 and first not in longer.ids

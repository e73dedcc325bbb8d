"""Prefixes computed once give the tokens and logits of rows computed whole."""

import pytest
import torch
from recipes_for_tests import IMAGES

from finetune.replies.shared_prefix import PrefixedBatch, cut_prefixes, generate_from_prefixes
from qwenvl.text.chat import render_chat, render_prompt

NEW = 6


def chat(processor, text: str, *images) -> list[int]:
    parts = [{"type": "image", "image": str(image)} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return render_chat(messages, processor.tokenizer, add_generation_prompt=True, n_queries=processor.n_queries).ids


def features_of(model, processor, *images) -> list[torch.Tensor]:
    pixels = processor.image_processor([str(image) for image in images], do_normalize=False, return_tensors="pt")
    with torch.no_grad():
        return list(model.get_image_features(pixels["pixel_values"]))


@pytest.fixture
def rows(tiny_processor):
    """Three questions on one page, one on another, two on a pair of pages, and one without any."""
    a, b, c, d, *_ = IMAGES
    asked = [
        ("What is it?", (a,)),
        ("How many are there of them, all in all?", (a,)),
        ("What?", (a,)),
        ("Who signed here, and when was that?", (b,)),
        ("Which is larger?", (c, d)),
        ("Which is redder, the first or the second?", (c, d)),
        ("Hello", ()),
    ]
    return [(chat(tiny_processor, text, *images), images) for text, images in asked]


def generate(model, batch, features, pad):
    made = generate_from_prefixes(
        model,
        batch,
        features,
        pad,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[:, batch.length :], torch.stack(made.logits, 1)


def test_tokens_and_logits_are_those_of_whole_rows(tiny_model, tiny_processor, rows):
    ids, images = [own for own, _ in rows], [own for _, own in rows]
    features = [features_of(tiny_model, tiny_processor, *own) if own else [] for own in images]
    cut = cut_prefixes(ids, [own or index for index, own in enumerate(images)], tiny_model.config)
    whole = PrefixedBatch([], [], ids)
    assert len(cut.prefixes) == 4 and cut.tokens < whole.tokens
    assert [cut.prefixes[number] + rest for number, rest in zip(cut.prefix_of, cut.rests, strict=True)] == ids
    pad = tiny_processor.tokenizer.pad_token_id
    tokens, logits = generate(tiny_model, cut, features, pad)
    for row, (own, own_features) in enumerate(zip(ids, features, strict=True)):
        alone, alone_logits = generate(tiny_model, PrefixedBatch([], [], [own]), [own_features], pad)
        assert tokens[row].tolist() == alone[0].tolist()
        assert (logits[row] - alone_logits[0]).abs().max() < 3e-5
    together, _ = generate(tiny_model, whole, features, pad)
    assert torch.equal(together, tokens)


def test_where_rows_are_cut(tiny_model, tiny_processor):
    """At the last common token before the texts part; never inside an image, and with a token left to go on from."""
    config, a = tiny_model.config, IMAGES[0]
    one, two = chat(tiny_processor, "What is it?", a), chat(tiny_processor, "What was it?", a)
    cut = cut_prefixes([one, two], ["a", "a"], config)
    (prefix,) = cut.prefixes
    assert one[: len(prefix)] == two[: len(prefix)] and one[len(prefix)] != two[len(prefix)]
    # The same row twice.
    cut = cut_prefixes([one, one], ["a", "a"], config)
    assert cut.prefixes == [one[:-1]] and cut.rests == [one[-1:], one[-1:]]
    # By itself: where the page ends.
    cut = cut_prefixes([one], ["a"], config)
    assert cut.prefixes[0][-1] == config.image_end_id and cut.prefixes[0].count(config.image_end_id) == 1
    # Two images that differ only in what they show look alike as ids; a row of one ends where the other goes on.
    short = one[: one.index(config.image_start_id) + 5]
    cut = cut_prefixes([one, short], ["a", "a"], config)
    assert cut.prefixes == [one[: one.index(config.image_start_id)]]


def test_an_image_after_the_text_is_in_the_rest(tiny_model, tiny_processor):
    """A prefix of text, then the images, as where a question comes first: the rest brings its own features."""
    parts = [{"type": "text", "text": "Page: "}, {"type": "image", "image": str(IMAGES[0])}]
    n_queries = tiny_processor.n_queries
    asked = [
        render_prompt([{"type": "text", "text": text}, *parts], tiny_processor.tokenizer, n_queries=n_queries).ids
        for text in ("What is it? ", "What was that? ")
    ]
    features = [features_of(tiny_model, tiny_processor, IMAGES[0])] * 2
    cut = cut_prefixes(asked, ["a", "a"], tiny_model.config)
    assert tiny_model.config.image_end_id not in cut.prefixes[0]
    pad = tiny_processor.tokenizer.pad_token_id
    tokens, _ = generate(tiny_model, cut, features, pad)
    whole, _ = generate(tiny_model, PrefixedBatch([], [], asked), features, pad)
    assert torch.equal(tokens, whole)

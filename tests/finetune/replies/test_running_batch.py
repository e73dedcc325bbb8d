"""Replies that join and leave a running batch are those of `generate` alone."""

import random

import pytest
import torch
from recipes_for_tests import IMAGES

from finetune.replies.decoder import PromptRow
from finetune.replies.running_batch import ReplyRequest, RunningBatch
from finetune.replies.torch_decoder import TorchDecoder
from qwenvl.text.chat import render_chat


def row(model, processor, text: str, *images, **options) -> PromptRow:
    parts = [{"type": "image", "image": str(image)} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    ids = render_chat(messages, processor.tokenizer, add_generation_prompt=True, n_queries=processor.n_queries).ids
    if not images:
        return PromptRow(ids, **options)
    pixels = processor.image_processor([str(image) for image in images], do_normalize=False, return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(pixels["pixel_values"])
    return PromptRow(ids, list(features), [str(image) for image in images], **options)


def alone(model, row: PromptRow, new: int, **options) -> list[int]:
    ids = torch.tensor([row.ids])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        image_features=torch.stack(list(row.features)) if row.features else None,
        max_new_tokens=new,
        do_sample=False,
        **{"eos_token_id": None, **options},
    )
    return made[0, len(row.ids) :].tolist()


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

"""Prompts for decoders, and what `generate` replies to one alone."""

import torch

from finetune.replies.decoder import PromptRow
from qwenvl.text.chat import render_chat


def row(model, processor, text: str, *images, **options) -> PromptRow:
    """A chat prompt about images, with their features by the model as it stands."""
    images = tuple(map(str, images))
    parts = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    ids = render_chat(messages, processor.tokenizer, add_generation_prompt=True, n_queries=processor.n_queries).ids
    if not images:
        return PromptRow(ids, **options)
    pixels = processor.image_processor(list(images), do_normalize=False, return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(pixels["pixel_values"])
    return PromptRow(ids, list(features), images, **options)


def alone(model, row: PromptRow, new: int, **options) -> list[int]:
    """The tokens that `generate` gives to one prompt."""
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

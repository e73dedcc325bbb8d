"""Warm start of the language model: to answer and to transcribe, on pages given as features of their symbols.

It stands for the text pre-training of the real language model. No image is seen here; the pages are what the vision
side is taught to give (see `page_symbols`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from examples.nano_documents.write import Plan, conversations_of
from examples.nano_training.optimizer import WarmStart, autocast, save_state
from examples.nano_training.page_symbols import page_features, page_symbols, symbol_features
from examples.nano_training.progress import Lines
from examples.nano_training.start import IMAGE_SIZE, LOW_IMAGE_SIZE, PATCH, WIDTH, place_weights
from examples.nano_training.texts import KNOWN_FAMILIES, ONE_PAGE, TWO_PAGES
from qwenvl import QwenVLTokenizer, load_model
from qwenvl.chat import IGNORED, Rendered, render_chat

DOCUMENTS = 8  # of a batch
PAIRS_EVERY = 6  # one document in so many is compared with another
PER_DOCUMENT = 6  # conversations, most of them joined
PER_PAIR = 4
JOINED = 0.85
LOW_EVERY = 8  # one batch in so many is of the lower resolution
GROUPS = 2  # that a batch is cut into, by length: less padding
RATE = 2e-3
NOISE = 0.15  # on the features, which are 1 where there is something
SAVE_EVERY = 200


def warm_language(start: Path, to: Path, steps: int, seed: int) -> None:
    """Train the language side of `start` for `steps` batches and write its tensors to `to`; it can be resumed."""
    torch.manual_seed(seed)
    model = load_model(str(start), dtype=torch.float32)
    model.set_attn_implementation("eager")  # the faster one at this size
    tokenizer = QwenVLTokenizer.from_pretrained(start)
    visual = model.transformer.visual
    tables = symbol_features(WIDTH)
    reading = {size: place_weights(visual.attn_pool, (size // PATCH) ** 2) for size in (IMAGE_SIZE, LOW_IMAGE_SIZE)}
    named = [(name, parameter) for name, parameter in model.named_parameters() if ".visual." not in name]
    training = WarmStart(named, RATE, steps)
    state_at, step = to.with_suffix(".state"), 0
    if state_at.exists():
        state = torch.load(state_at)
        model.load_state_dict(state["language"], strict=False)
        training.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        step = state["step"]
    model.train()
    lines = Lines("language", steps, step)
    while step < steps:
        size = LOW_IMAGE_SIZE if step % LOW_EVERY == 0 else IMAGE_SIZE
        samples = batch(tokenizer, model.config.n_queries, seed, step, size)
        supervised = sum(rendered.supervised for rendered, _ in samples)
        total, right = 0.0, 0
        for group in range(GROUPS):
            part = samples[_cut(samples, group)]
            if not part:
                continue
            ids, labels = padded([rendered for rendered, _ in part], tokenizer.pad_token_id or 0)
            pages = torch.from_numpy(np.stack([page for _, pages in part for page in pages]))
            features = page_features(pages, tables, reading[size])
            features = features + NOISE * torch.randn_like(features)
            wanted = labels[:, 1:].flatten()
            rows = (wanted != IGNORED).nonzero()[:, 0]
            with autocast():
                hidden = model.transformer(input_ids=ids, image_features=features, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[rows])
            loss = torch.nn.functional.cross_entropy(logits.float(), wanted[rows], reduction="sum") / supervised
            loss.backward()
            total += loss.item()
            right += int((logits.argmax(-1) == wanted[rows]).sum())
        training.step(step)
        step += 1
        if size == IMAGE_SIZE:
            lines.add(step, loss=total, tokens=right / supervised)
        if step % SAVE_EVERY == 0:
            state = {"language": _language(model), "step": step, "random": torch.get_rng_state()}
            save_state(state_at, state | {"optimizer": training.optimizer.state_dict()})
    save_state(to, _language(model))


def _language(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".visual." not in name}


def _cut(samples: Sequence, group: int) -> slice:
    size = -(-len(samples) // GROUPS)
    return slice(group * size, (group + 1) * size)


def batch(tokenizer: QwenVLTokenizer, n_queries: int, seed: int, step: int, size: int):
    """A step's conversations, short ones first, each with the symbols of its pages, (patches, parts)."""
    page = Plan(
        "train",
        KNOWN_FAMILIES,
        ONE_PAGE,
        count=1,
        per_image=PER_DOCUMENT,
        image_size=size,
        difficulty=0.0,  # only where things stand is of interest
        seed=2000 + seed,
        joined=JOINED,
    )
    pair = replace(page, kinds=TWO_PAGES, per_image=PER_PAIR)
    samples: list[tuple[Rendered, list[np.ndarray]]] = []
    for index in range(step * DOCUMENTS, (step + 1) * DOCUMENTS):
        plan = pair if index % PAIRS_EVERY == 0 else page
        # Of a document asked about in several conversations, one is enough.
        for conversation in conversations_of(plan, index)[:1]:
            rendered = render_chat(conversation.messages, tokenizer, n_queries=n_queries)
            samples.append((rendered, [page_symbols(shown, PATCH) for shown in conversation.documents]))
    return sorted(samples, key=lambda sample: len(sample[0].ids))


def padded(rendered: Sequence[Rendered], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, (conversations, longest), padded on the right, where nothing looks."""
    longest = max(len(one.ids) for one in rendered)
    ids = torch.full((len(rendered), longest), pad)
    labels = torch.full((len(rendered), longest), IGNORED)
    for row, one in enumerate(rendered):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        labels[row, : len(one.labels)] = torch.tensor(one.labels)
    return ids, labels

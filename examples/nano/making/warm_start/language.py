"""Warm start of the language model: to answer and transcribe, from pages given as features of their symbols.

It replaces the text pre-training of the real language model. There are no images; pages are the features that the
vision side learns to output (see `page_symbols`).

It transcribes first. That has twice as many supervised tokens at the same cost, and teaches to find the place where a
text continues, which answers need too. Starting with all kinds of conversation at once takes longer.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from examples.nano.making.arithmetic import autocast
from examples.nano.making.documents.write import Plan, conversations_of
from examples.nano.making.page_symbols import page_features, page_symbols, symbol_features
from examples.nano.making.start import IMAGE_SIZE, LOW_IMAGE_SIZE, PATCH, WIDTH, place_weights
from examples.nano.making.texts import ONE_PAGE, READ, TRAINED, TWO_PAGES, WITH_FIELDS
from examples.nano.making.warm_start.progress import Lines
from examples.nano.making.warm_start.training import WarmStart, save_state
from qwenvl import QwenVLTokenizer, load_model
from qwenvl.model.varlen_attention import VARLEN
from qwenvl.text.chat import IGNORED, Rendered, render_chat

DOCUMENTS = 8  # in a batch
READING = 0.34  # share of the steps, at the start, with transcriptions alone
PAIRS_EVERY = 6  # one document in 6 is compared with another
PER_DOCUMENT = 6  # conversations, most of them joined
PER_PAIR = 4
JOINED = 0.85
LOW_EVERY = 8  # one batch in 8 has the lower resolution
RATE = 2e-3
NOISE = 0.15  # standard deviation of the noise on features, whose own is 1
SAVE_EVERY = 200


def warm_language(start: Path, to: Path, steps: int, seed: int) -> None:
    """Train the language side of `start` for `steps` batches and write its tensors to `to`; can be resumed."""
    torch.manual_seed(seed)
    model = load_model(str(start), dtype=torch.float32)
    model.set_attn_implementation(VARLEN)
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
        samples = batch(tokenizer, model.config.n_queries, seed, step, size, reading_alone=step < READING * steps)
        ids, labels, lengths = packed([rendered for rendered, _ in samples])
        pages = torch.from_numpy(np.stack([page for _, pages in samples for page in pages]))
        features = page_features(pages, tables, reading[size])
        features = features + NOISE * torch.randn_like(features)
        wanted = labels[0, 1:]
        rows = (wanted != IGNORED).nonzero()[:, 0]
        with autocast(ids.device):
            hidden = model.transformer(
                input_ids=ids, sequence_lengths=lengths, image_features=features, use_cache=False
            ).last_hidden_state
            logits = model.lm_head(hidden[0, rows])
        loss = torch.nn.functional.cross_entropy(logits.float(), wanted[rows])
        loss.backward()
        right = (logits.argmax(-1) == wanted[rows]).float().mean()
        training.step(step)
        step += 1
        if size == IMAGE_SIZE:
            lines.add(step, loss=loss.item(), tokens=right.item())
        if step % SAVE_EVERY == 0:
            state = {"language": _language(model), "step": step, "random": torch.get_rng_state()}
            save_state(state_at, state | {"optimizer": training.optimizer.state_dict()})
    save_state(to, _language(model))


def _language(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the language side."""
    return {name: value for name, value in model.state_dict().items() if ".visual." not in name}


def batch(
    tokenizer: QwenVLTokenizer, n_queries: int, seed: int, step: int, size: int, *, reading_alone: bool
) -> list[tuple[Rendered, list[np.ndarray]]]:
    """The conversations of a step, each with the symbols of its pages, (patches, parts)."""
    page = Plan(
        "train",
        TRAINED,
        ONE_PAGE,
        count=1,
        per_image=PER_DOCUMENT,
        image_size=size,
        difficulty=0.0,  # the symbols do not depend on it
        seed=2000 + seed,
        joined=JOINED,
    )
    reading = replace(page, families=READ, kinds=("transcribe",), per_image=1, joined=0.0)
    pair = replace(page, families=WITH_FIELDS, kinds=TWO_PAGES, per_image=PER_PAIR)
    samples: list[tuple[Rendered, list[np.ndarray]]] = []
    for index in range(step * DOCUMENTS, (step + 1) * DOCUMENTS):
        plan = reading if reading_alone else pair if index % PAIRS_EVERY == 0 else page
        # One conversation about each document.
        for conversation in conversations_of(plan, index)[:1]:
            rendered = render_chat(conversation.messages, tokenizer, n_queries=n_queries)
            samples.append((rendered, [page_symbols(shown, PATCH) for shown in conversation.documents]))
    return samples


def packed(rendered: Sequence[Rendered]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Conversations concatenated: ids and labels, (1, tokens), and the number of tokens of each."""
    ids = torch.tensor([[token for one in rendered for token in one.ids]])
    labels = torch.tensor([[label for one in rendered for label in one.labels]])
    return ids, labels, [len(one.ids) for one in rendered]

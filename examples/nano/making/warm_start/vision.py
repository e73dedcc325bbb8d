"""Warm start of the vision side: to predict the letters of each patch, and output the features of their symbols.

It replaces the image-text pre-training of the real vision transformer. Pages come in both resolutions.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from examples.nano.making.arithmetic import autocast
from examples.nano.making.documents.document import make_document
from examples.nano.making.page_symbols import PARTS, WIDTHS, page_features, page_symbols, symbol_features
from examples.nano.making.start import IMAGE_SIZE, LOW_IMAGE_SIZE, PATCH, WIDTH, place_weights
from examples.nano.making.texts import READ
from examples.nano.making.warm_start.dense_page import dense_page
from examples.nano.making.warm_start.progress import Lines
from examples.nano.making.warm_start.training import WarmStart, save_state
from qwenvl import load_model
from qwenvl.images.image_processor import normalize_pixels

BATCH = 16
DENSE = 0.6  # share of the pages
LOW_EVERY = 8  # one batch in 8 has the lower resolution
RATE, EQUAL_RATE = 3e-3, 1.5e-3
TELLING = 0.5  # share of the steps before the features themselves are trained
EQUAL_WEIGHT = 20.0  # of the features' error, relative to the symbols' cross-entropy
SAVE_EVERY = 500


class SymbolHeads(nn.Module):
    """Classifies features by their dot products with the features of each symbol; discarded afterwards.

    `head` maps the vision transformer's patches, which are classified too: early on this gives it more direct
    gradients than those through the adapter.
    """

    def __init__(self, tables: list[torch.Tensor]) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.tables = tables
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(len(table))) for table in tables)

    def loss(self, features: torch.Tensor, symbols: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Classify features.

        Args:
            features: (images, patches, width)
            symbols: (images, patches, parts)

        Returns:
            The cross-entropy, and the share of the letters that are right.
        """
        total, right, letters = features.new_zeros(()), 0, 0
        for number, (name, table, bias) in enumerate(zip(PARTS, self.tables, self.bias, strict=True)):
            logits = features @ table.T + bias
            wanted = symbols[..., number]
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            there = wanted.flatten() > 0
            # Most patches are empty: those that are not have the same weight as all patches together.
            total = total + losses.mean() + (losses * there).sum() / there.sum().clamp(min=1)
            if name.startswith("letter"):
                right += int(((logits.argmax(-1) == wanted) & (wanted > 0)).sum())
                letters += int(there.sum())
        return total, right / max(letters, 1)


def feature_error(features: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error of features, averaged over parts; patches with and without content have the same weight.

    Args:
        features, wanted: (images, queries, width)

    Returns:
        A scalar. Each part adds its error relative to the features wanted, which is 1 if all features are 0.
    """
    total = features.new_zeros(())
    for own, is_wanted in zip(
        features.split(list(WIDTHS.values()), -1), wanted.split(list(WIDTHS.values()), -1), strict=True
    ):
        errors, size = (own - is_wanted).square().sum(-1), is_wanted.square().sum(-1)
        there = size > 0.1 * own.shape[-1]
        if there.any():
            total = total + errors[there].sum() / size[there].sum()
        if not there.all():
            total = total + errors[~there].mean() / own.shape[-1]
    return total / len(WIDTHS)


def warm_vision(start: Path, to: Path, steps: int, seed: int) -> None:
    """Train the vision side of `start` for `steps` batches and write its tensors to `to`; can be resumed.

    In the first part of the steps its features are classified; in the second they also have to equal those wanted.
    """
    torch.manual_seed(seed)
    visual = load_model(str(start), dtype=torch.float32).transformer.visual
    visual.attn_pool.attn.config._attn_implementation = "eager"  # the faster one at this size
    tables = symbol_features(WIDTH)
    heads = SymbolHeads(tables)
    reading = {size: place_weights(visual.attn_pool, (size // PATCH) ** 2) for size in (IMAGE_SIZE, LOW_IMAGE_SIZE)}
    telling = round(steps * TELLING)
    state_at, step = to.with_suffix(".state"), 0
    state = torch.load(state_at) if state_at.exists() else None
    if state is not None:
        visual.load_state_dict(state["visual"])
        heads.load_state_dict(state["heads"])
        step = state["step"]
    trunk: list[torch.Tensor] = []
    visual.transformer.register_forward_hook(lambda module, inputs, output: trunk.append(output))
    lines = Lines("vision", steps, step)
    for first, last, rate in ((0, telling, RATE), (telling, steps, EQUAL_RATE)):
        if step >= last:
            continue
        training = WarmStart([*visual.named_parameters(), *heads.named_parameters()], rate, last - first)
        if state is not None and step > first:
            training.optimizer.load_state_dict(state["optimizer"])
        while step < last:
            size = LOW_IMAGE_SIZE if step % LOW_EVERY == 0 else IMAGE_SIZE
            pixels, symbols = batch(seed, step, size)
            with autocast(pixels.device):
                features = visual(normalize_pixels(pixels))
            features, patches = features.float(), trunk.pop().float()
            error = feature_error(features, page_features(symbols, tables, reading[size]))
            loss, right = heads.loss(heads.head(patches), symbols)
            if first == telling:
                loss = loss + EQUAL_WEIGHT * error
            elif size == IMAGE_SIZE:  # a query for each patch
                symbol_loss, right = heads.loss(features, symbols)
                loss = loss + symbol_loss
            loss.backward()
            training.step(step - first)
            step += 1
            if size == IMAGE_SIZE:
                lines.add(step, loss=loss.item(), letters=right, features=error.item())
            if step % SAVE_EVERY == 0:
                saved = {"visual": visual.state_dict(), "heads": heads.state_dict(), "step": step}
                save_state(state_at, saved | {"optimizer": training.optimizer.state_dict()})
    save_state(to, {f"transformer.visual.{name}": value for name, value in visual.state_dict().items()})


def batch(seed: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pixels (images, 3, S, S) and symbols (images, patches, parts) of a step's pages."""
    pixels, symbols = [], []
    for place in range(BATCH):
        index = step * BATCH + place
        draw = random.Random(f"{seed}/{index}")
        hard = 0.8 * draw.random()
        if draw.random() < DENSE:
            page = dense_page(f"{1000 + seed}/{index}", size, hard)
        else:
            family = READ[index % len(READ)]
            page = make_document(
                family, seed=1000 + seed, split="train", index=index, image_size=size, difficulty=hard
            )
        pixels.append(torch.from_numpy(np.asarray(page.image).copy()).permute(2, 0, 1))
        symbols.append(torch.from_numpy(page_symbols(page, PATCH)))
    return torch.stack(pixels), torch.stack(symbols)

"""GGUF folders for tests: exports of the nano checkpoint, questions on its pages, and the replies of PyTorch."""

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from llamacpp_for_tests import UNAVAILABLE
from recipes_for_tests import ROOT

from finetune.export.export import export
from finetune.replies.decoder import PromptRow
from finetune.replies.running_batch import ReplyRequest, RunningBatch
from finetune.terminal import say_nothing
from qwenvl import load_model, load_processor

NANO = ROOT / "examples" / "nano"
KNOWN = ROOT / "examples" / "quickstart" / "known"
NEW_TOKENS = 24
__all__ = ["KNOWN", "NANO", "UNAVAILABLE", "Page", "changed_copy", "exported", "pages", "replies"]


@functools.cache
def exported(kind: str = "f16") -> Path:
    """The nano checkpoint as GGUF; not to be changed."""
    place = tempfile.mkdtemp(prefix="gguf-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = Path(place) / f"nano-{kind}"
    return export(str(NANO), "gguf", type=kind, out=folder, say=say_nothing)


def changed_copy(folder: Path) -> Path:
    """A copy of the nano checkpoint's export, to be changed."""
    shutil.copytree(exported(), folder)
    return folder


@dataclass(frozen=True)
class Page:
    """A question on a page.

    Attributes:
        ids: of the prompt.
        pixels: (1, 3, S, S) uint8.
        features: (1, n_queries, hidden) as PyTorch computes them.
        image: name of the page's file.
        reply: tokens of PyTorch's greedy reply, without the one that ends it.
    """

    ids: list[int]
    pixels: torch.Tensor
    features: torch.Tensor
    image: str
    reply: list[int]

    @property
    def row(self) -> PromptRow:
        return PromptRow(self.ids, list(self.features), [self.image])


@torch.inference_mode()
@functools.cache
def pages(count: int) -> list[Page]:
    """The first questions on pages of known kinds."""
    model, processor = load_model(NANO), load_processor(NANO)
    found = []
    for line in (KNOWN / "test.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        image = row["images"][0]
        parts = [{"type": "image", "image": str(KNOWN / image)}, *row["messages"][0]["content"][1:]]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
        ids = inputs["input_ids"]
        reply = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
        ends = model.generation_config.eos_token_id
        pixels = processor.image_processor([str(KNOWN / image)], do_normalize=False, return_tensors="pt")
        features = model.get_image_features(inputs["pixel_values"])
        reply = [token for token in reply if token not in ends]
        found.append(Page(ids[0].tolist(), pixels["pixel_values"], features.float(), image, reply))
    return found


def replies(decoder, tokenizer, stop_ids, rows, at_once: int) -> list[list[int]]:
    """The tokens of greedy replies, so many of which grow together; each joins when another has left."""
    batch, waiting, found, place = RunningBatch(decoder, tokenizer), list(enumerate(rows)), {}, {}

    def take(new):
        for token in new:
            found[place[token.reply]] += [] if token.id is None else [token.id]

    while waiting or len(batch):
        if waiting and len(batch) < at_once:
            index, row = waiting.pop(0)
            (number,), new = batch.join([ReplyRequest(row, NEW_TOKENS, stop_ids)])
            found[index], place[number] = [], index
        else:
            new = batch.step()
        take(new)
    return [found[index] for index in range(len(rows))]

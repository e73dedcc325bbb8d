"""What a nano checkpoint can do on documents that it has not seen: greedy replies, scored kind by kind.

python -m examples.nano.making.scores examples/nano
python -m examples.nano.making.scores examples/nano --families boarding --documents 100
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.nano.making.documents.conversations import KINDS, Conversation, families_with
from examples.nano.making.documents.families import FAMILIES
from examples.nano.making.documents.write import Plan, conversations_of
from examples.nano.making.stage import DEVICE
from examples.nano.making.start import MAX_NEW_TOKENS
from examples.nano.making.texts import KNOWN_FAMILIES, ONE_PAGE, TWO_PAGES
from finetune.evaluation.predictions import split_last_reply
from finetune.metrics.answers import anls, edit_distance, exact_match
from finetune.metrics.boxes import grounding_accuracy
from finetune.replies.replies import Decoding, Prompt, generate_replies, plan_replies, stop_ids_of
from qwenvl import ImageAccess, load_model, load_processor
from qwenvl.text.chat import render_chat

CHOICES = (": Picture 1", ": Picture 2")
"""How replies end that compare two pictures; half of the choices are right by chance."""


@dataclass(frozen=True)
class Scored:
    """A conversation's last turn, the reply to it, and its scores by the names of columns."""

    conversation: Conversation
    reply: str
    scores: dict[str, float]


def reply_to(model, processor, made: Sequence[Conversation]) -> list[str]:
    """The model's own reply to the last turn of each conversation; the turns before it are as they should be."""
    prompts = []
    for conversation in made:
        asked, _ = split_last_reply(conversation.messages)
        images = iter(conversation.documents)
        asked = [
            {
                **message,
                "content": [
                    {**part, "image": next(images).image} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in asked
        ]
        rendered = render_chat(asked, processor.tokenizer, add_generation_prompt=True, n_queries=processor.n_queries)
        prompts.append(Prompt(rendered.ids, rendered.images, ImageAccess(), conversation.kind))
    decoding = Decoding(MAX_NEW_TOKENS, stop_ids_of(model, processor.tokenizer))
    replies = generate_replies(
        model, prompts, plan_replies(prompts), processor.tokenizer, processor.image_processor, decoding
    )
    texts = {reply.index: reply.text for reply in replies}
    return [texts[index] for index in range(len(made))]


def score(conversation: Conversation, reply: str) -> dict[str, float]:
    """Scores of a reply: ANLS and exact match of an answer, whether the right one of two pictures was chosen,
    character errors of a transcription, IoU 0.5 of a box.
    """
    answers = conversation.answers
    if conversation.kind == "transcribe":
        return {"errors": edit_distance(reply, answers[0]), "characters": len(answers[0])}
    if conversation.kind == "ground":
        from finetune.metrics.boxes import first_box

        size = conversation.documents[0].image.size
        return {"iou 0.5": grounding_accuracy(reply, first_box(answers[0], size), size)}
    scores = {"anls": anls(reply, answers), "exact": exact_match(reply, answers)}
    if answers[0].endswith(CHOICES):
        scores["choice"] = float(reply.rpartition(": ")[2] == answers[0].rpartition(": ")[2])
    return scores


def evaluate(
    model, processor, *, families: Sequence[str], kinds: Sequence[str], documents: int, split: str, seed: int
) -> list[Scored]:
    plan = Plan(split, tuple(families), tuple(kinds), documents, per_image=2, seed=seed)
    made = [conversation for index in range(documents) for conversation in conversations_of(plan, index)]
    replies = reply_to(model, processor, made)
    return [Scored(one, reply, score(one, reply)) for one, reply in zip(made, replies, strict=True)]


def group_of(conversation: Conversation) -> str:
    if conversation.kind == "two_images":
        compares = conversation.answers[0].endswith(CHOICES)
        return "two images, compared" if compares else "two images, one of them asked about"
    return conversation.kind.replace("_", " ")


def table(scored: Sequence[Scored]) -> str:
    """Markdown: a row for each kind of conversation, and for questions one for each family."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        groups[group_of(one.conversation)].append(one)
        if one.conversation.kind == "question":
            groups[f"question, {one.conversation.documents[0].family}"].append(one)
    rows = ["| | replies | ANLS | exact | choice | character errors | IoU 0.5 |", "|---|---|---|---|---|---|---|"]
    for name, members in sorted(groups.items()):
        cells = [name, str(len(members))]
        for column in ("anls", "exact", "choice"):
            values = [one.scores[column] for one in members if column in one.scores]
            cells.append(f"{sum(values) / len(values):.3f}" if values else "")
        errors = sum(one.scores.get("errors", 0) for one in members)
        characters = sum(one.scores.get("characters", 0) for one in members)
        cells.append(f"{errors / characters:.1%}" if characters else "")
        found = [one.scores["iou 0.5"] for one in members if "iou 0.5" in one.scores]
        cells.append(f"{sum(found) / len(found):.3f}" if found else "")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder, or run folder")
    parser.add_argument("--documents", type=int, default=700)
    parser.add_argument("--families", type=_names, help=f"{', '.join(FAMILIES)}; by default those trained on")
    parser.add_argument("--kinds", type=_names, default=(*ONE_PAGE, *TWO_PAGES), help=", ".join(KINDS))
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--show", type=int, default=0, help="print so many replies of each kind beside the answers")
    given = parser.parse_args()
    model = load_model(str(given.model), dtype=getattr(torch, given.dtype)).to(DEVICE)
    scored = evaluate(
        model,
        load_processor(str(given.model)),
        families=given.families or families_with(given.kinds, KNOWN_FAMILIES),
        kinds=given.kinds,
        documents=given.documents,
        split=given.split,
        seed=given.seed,
    )
    print(table(scored))
    for kind in KINDS:
        for one in [one for one in scored if one.conversation.kind == kind][: given.show]:
            asked = one.conversation.messages[-2]["content"][-1]["text"]
            family = one.conversation.documents[0].family
            print(f"{kind}, {family}: {asked!r} -> {one.reply!r}, should be {one.conversation.answers[0]!r}")


if __name__ == "__main__":
    main()

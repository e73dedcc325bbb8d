"""Score a nano checkpoint on documents that it has not seen: greedy replies, by kind of conversation.

python -m examples.nano.making.scores examples/nano
python -m examples.nano.making.scores examples/nano --families boarding --documents 100
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from examples.nano.making.documents.arguments import chosen_families, names_from
from examples.nano.making.documents.conversations import KINDS, Conversation
from examples.nano.making.documents.families import FAMILIES
from examples.nano.making.documents.values import SPLITS
from examples.nano.making.documents.write import Plan, conversations_of
from examples.nano.making.stage import DEVICE
from examples.nano.making.start import MAX_NEW_TOKENS
from examples.nano.making.texts import KNOWN_FAMILIES, ONE_PAGE, TWO_PAGES
from finetune.metrics.answers import anls, edit_distance, exact_match
from finetune.metrics.boxes import first_box, grounding_accuracy
from finetune.replies.replies import Decoding, Prompt, generate_replies, plan_replies, stop_ids_of
from qwenvl import ImageAccess, InputError, QwenVLForConditionalGeneration, QwenVLProcessor, load_model, load_processor
from qwenvl.text.chat import render_chat

Model = QwenVLForConditionalGeneration | PeftModel
CHOICES = (": Picture 1", ": Picture 2")
"""How replies to comparisons of two pictures end; half of the choices are right by chance."""


@dataclass(frozen=True)
class Scored:
    """A conversation, the reply to its last question, and its scores: name -> value."""

    conversation: Conversation
    reply: str
    scores: dict[str, float]


def reply_to(model: Model, processor: QwenVLProcessor, made: Sequence[Conversation]) -> list[str]:
    """Generate a reply to the last question of each conversation; the earlier turns have the right replies."""
    prompts = []
    for conversation in made:
        images = iter(conversation.documents)
        asked = [
            {
                **message,
                "content": [
                    {**part, "image": next(images).image} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in conversation.messages[:-1]
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
    """Score a reply.

    Returns:
        "errors" and "characters" of a transcription, "iou 0.5" of a box, "anls" and "exact" of any other answer, and
        "choice" if it chooses one of two pictures.
    """
    answers = conversation.answers
    if conversation.kind == "transcribe":
        return {"errors": edit_distance(reply, answers[0]), "characters": len(answers[0])}
    if conversation.kind == "ground":
        size = conversation.documents[0].image.size
        gold = first_box(answers[0], size)
        assert gold is not None, "the answer is a box"
        return {"iou 0.5": grounding_accuracy(reply, gold, size)}
    scores = {"anls": anls(reply, answers), "exact": exact_match(reply, answers)}
    if answers[0].endswith(CHOICES):
        scores["choice"] = float(reply.rpartition(": ")[2] == answers[0].rpartition(": ")[2])
    return scores


def evaluate(
    model: Model,
    processor: QwenVLProcessor,
    *,
    families: Sequence[str],
    kinds: Sequence[str],
    documents: int,
    split: str,
    seed: int,
) -> list[Scored]:
    """Ask about `documents` documents, and score the replies."""
    plan = Plan(split, tuple(families), tuple(kinds), documents, per_image=2, seed=seed)
    made = [conversation for index in range(documents) for conversation in conversations_of(plan, index)]
    replies = reply_to(model, processor, made)
    return [Scored(one, reply, score(one, reply)) for one, reply in zip(made, replies, strict=True)]


def group_of(conversation: Conversation) -> str:
    """The row of the table that a conversation counts in."""
    if conversation.kind == "two_images":
        compares = conversation.answers[0].endswith(CHOICES)
        return "two images, compared" if compares else "two images, one of them asked about"
    return conversation.kind.replace("_", " ")


def table(scored: Sequence[Scored]) -> str:
    """A Markdown table: a row for each kind of conversation, and for questions one for each family too."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder, or run folder")
    parser.add_argument("--documents", type=int, default=700)
    listed = f"of {', '.join(FAMILIES)}; by default those trained on"
    parser.add_argument("--families", type=names_from("family", FAMILIES), help=listed)
    kinds = (*ONE_PAGE, *TWO_PAGES)
    parser.add_argument("--kinds", type=names_from("kind", KINDS), default=kinds, help=f"of {', '.join(KINDS)}")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--show", type=int, default=0, help="print this many replies of each kind beside the answers")
    given = parser.parse_args()
    families = chosen_families(parser, given.families, given.kinds, KNOWN_FAMILIES)
    try:
        model = load_model(given.model, dtype=given.dtype, device_map=str(DEVICE))
        processor = load_processor(given.model)
    except InputError as error:
        parser.error(str(error))
    scored = evaluate(
        model,
        processor,
        families=families,
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

"""Turns dropped from the front: what is left fits, is whole, and is what the collator trains."""

import json
import random
from types import SimpleNamespace

import pytest

from finetune.batches.collate import Collator
from finetune.data.checks.checking import check_samples
from finetune.data.checks.rules import Rules
from finetune.data.checks.shortening import render_fitting, turn_starts
from finetune.data.samples import Samples
from finetune.data.summary import count_rows, describe_data, lines_left_out
from qwenvl.text.chat import IGNORED, render_chat

N_QUERIES = 4


@pytest.fixture
def tokenizer(tiny_processor):
    return tiny_processor.tokenizer


def user(*words, images=()):
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": " ".join(words)}]}


def assistant(text):
    return {"role": "assistant", "content": text}


def draw_conversation(draw: random.Random) -> list[dict]:
    """Any order of roles that has a reply; texts and images are told apart by numbers."""
    messages, number = [], iter(range(1000))
    if draw.random() < 0.3:
        messages.append({"role": "system", "content": "Be brief."})
    for _ in range(draw.randint(1, 9)):
        if draw.random() < 0.55:
            images = [f"image-{next(number)}" for _ in range(draw.choice([0, 0, 1, 2]))]
            messages.append(user(f"question {next(number)}", *["more"] * draw.randint(0, 12), images=images))
        else:
            messages.append(assistant(f"reply {next(number)}" + " and so on" * draw.randint(0, 12)))
    if all(message["role"] != "assistant" for message in messages):
        messages.append(assistant("reply at last"))
    return messages


def starts_a_turn(messages, index) -> bool:
    return messages[index]["role"] == "user" and messages[index - 1]["role"] != "user"


def supervised_text(rendered, tokenizer) -> str:
    return tokenizer.decode([label for label in rendered.labels if label != IGNORED])


def test_what_fits_is_a_suffix_of_whole_turns(tokenizer):
    draw = random.Random(11)
    shortened = unhelped = 0
    for _ in range(1000):
        messages = draw_conversation(draw)
        system = messages[: messages[0]["role"] == "system"]
        how = {"labels": draw.choice(["assistant", "structure"]), "grounding": False, "n_queries": N_QUERIES}
        whole = render_chat(messages, tokenizer, **how)
        for limit in (40, 90, 150, 240, len(whole.ids), len(whole.ids) - 1):
            fitted = render_fitting(messages, tokenizer, max_length=limit, on_long="drop_turns", **how)
            kept = list(fitted.messages)
            if not fitted.turns_dropped:
                assert kept == messages and fitted.rendered == whole
                if len(whole.ids) > limit:
                    unhelped += 1
                    last = render_chat([*system, *messages[turn_starts(messages)[-1] :]], tokenizer, **how)
                    assert len(last.ids) > limit
                continue
            shortened += 1
            assert len(fitted.rendered.ids) <= limit < len(whole.ids)
            # A suffix at the beginning of a turn, after the system message.
            tail = kept[len(system) :]
            assert kept[: len(system)] == system
            assert messages[-len(tail) :] == tail
            first = len(messages) - len(tail)
            assert starts_a_turn(messages, first)
            assert fitted.rendered.images == whole.images[len(whole.images) - len(fitted.rendered.images) :]
            assert fitted.rendered.ids.count(tokenizer.image_pad_id) == N_QUERIES * len(fitted.rendered.images)
            if how["labels"] == "assistant":
                replies = [message["content"] for message in tail if message["role"] == "assistant"]
                assert replies
                assert supervised_text(fitted.rendered, tokenizer) == "".join(f"{r}<|im_end|>" for r in replies)
            # One turn more would be too long.
            before = next(i for i in range(first - 1, -1, -1) if i == len(system) or starts_a_turn(messages, i))
            more = render_chat([*system, *messages[before:]], tokenizer, **how)
            assert len(more.ids) > limit
    assert shortened > 500 and unhelped > 300


def test_turns_begin_with_what_the_user_says():
    s, u, a = {"role": "system"}, {"role": "user"}, {"role": "assistant"}
    assert turn_starts([s, u, a, u, a]) == [1, 3]
    assert turn_starts([u, u, a, a, u, a]) == [0, 4]
    assert turn_starts([a, u, a]) == [0, 1]
    assert turn_starts([u, a, u]) == [0], "nothing is trained of a question without reply"
    assert turn_starts([s, u, a, u, a, u, u]) == [1, 3]


def test_pictures_are_numbered_by_what_stays(tokenizer):
    messages = [user("a", images=["1", "2"]), assistant("b" * 30), user("c", images=["3"]), assistant("d")]
    how = {"labels": "assistant", "grounding": False, "n_queries": N_QUERIES}
    length = len(render_chat(messages, tokenizer, n_queries=N_QUERIES).ids)
    fitted = render_fitting(messages, tokenizer, max_length=length - 1, on_long="drop_turns", **how)
    text = tokenizer.decode(fitted.rendered.ids)
    assert fitted.rendered.images == ["3"]
    assert "Picture 1:<img>" in text and "Picture 2:" not in text


@pytest.mark.parametrize("on_long", ["error", "drop"])
def test_other_rules_leave_conversations_whole(tokenizer, on_long):
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    how = {"labels": "assistant", "grounding": False, "n_queries": N_QUERIES}
    fitted = render_fitting(messages, tokenizer, max_length=10, on_long=on_long, **how)
    assert fitted.messages == messages and fitted.turns_dropped == 0


@pytest.fixture
def read(tmp_path, tiny_processor, tiny_images):
    """Three rows: one that fits, one that loses two of its three turns, one whose last exchange is too long."""
    image = str(tiny_images[0])
    rows = [
        [user("short"), assistant("yes")],
        [
            *(user("first", images=[image]), assistant("long " * 40)),
            *(user("second", images=[image, image]), assistant("long " * 40)),
            *(user("third", images=[image]), assistant("short")),
        ],
        [user("first"), assistant("short"), user("x " * 90), assistant("yes")],
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    source = {"format": "messages", "columns": {}, "prompt": None, "box_form": None, "weight": 1.0, "limit": None}
    source |= {
        "path": str(file),
        "config": None,
        "split": None,
        "streaming": False,
        "encoding": None,
        "delimiter": None,
        "annotations": None,
        "part": None,
    }
    samples = Samples([SimpleNamespace(**source)], images_root=tiny_images[0].parent)
    rule = {"max_length": 120, "on_long": "drop_turns"}
    checked = check_samples(samples, tiny_processor.tokenizer, n_queries=N_QUERIES, show_progress=False, **rule)
    rules = Rules(tiny_processor.tokenizer, n_queries=N_QUERIES, **rule)
    return checked, Collator(samples, rules, tiny_processor.image_processor)


def test_what_is_shortened_is_counted_and_listed(read):
    checked, _ = read
    assert checked.kept.tolist() == [0, 1]
    assert checked.images.tolist() == [0, 1]
    assert [(one.origin.row, one.turns_dropped) for one in checked.shortened] == [(2, 2)]
    assert [one.origin.row for one in checked.dropped_long] == [3]
    assert checked.total == 3
    assert describe_data(checked).endswith("left out: 1 too long; shortened: 1, by 2 turns at the front")
    counts = count_rows(checked)
    assert (counts["shortened"], counts["turns_dropped"], counts["too_long"]) == (1, 2, 1)
    lines = [json.loads(line) for line in lines_left_out(checked)]
    assert lines[0]["origin"].endswith("row 3") and lines[0]["reason"].startswith("too long")
    assert lines[1]["origin"].endswith("row 2") and lines[1]["turns_dropped"] == 2


def test_what_is_checked_is_what_is_trained(read, tiny_processor):
    checked, collator = read
    batch = collator([{"sample": int(index)} for index in checked.kept])
    assert batch["sequence_lengths"].tolist() == checked.lengths.tolist()
    assert batch["sequence_images"].tolist() == checked.images.tolist()
    assert len(batch["pixel_values"]) == checked.images.sum() == 1
    trained = [label for label in batch["labels"][0].tolist() if label != IGNORED]
    assert len(trained) == checked.supervised.sum()
    assert tiny_processor.tokenizer.decode(trained) == "yes<|im_end|>short<|im_end|>"

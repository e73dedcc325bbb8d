import json

import pytest
from recipes_for_tests import TINY

from finetune.check.sample_preview import preview
from finetune.data.checks.checking import look_at, refusal
from finetune.data.checks.rules import Rules
from finetune.data.reading import open_samples
from finetune.data.summary import describe_train_on
from finetune.recipe import parse_recipe
from qwenvl.text.chat import IGNORED, train_last_only

SYSTEM, ASK = {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}
TELL = {"role": "assistant", "content": "A"}
AGAIN = {"role": "assistant", "content": "B"}


def samples_of(folder, *conversations, **data):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": list(messages)}) + "\n" for messages in conversations))
    recipe = parse_recipe(
        f"model: {{path: {TINY}}}\noutput: {folder}/run\ndata: {{train: {{path: {file}, format: messages}}}}",
        [f"data.{key}={value}" for key, value in data.items()],
    )
    return open_samples(recipe, recipe.data.train)


@pytest.mark.parametrize("labels", ["assistant", "structure"])
@pytest.mark.parametrize(
    ("messages", "trained"),
    [
        ([ASK, TELL, ASK, AGAIN], "B<|im_end|>"),
        ([SYSTEM, ASK, TELL], "A<|im_end|>"),
        ([ASK, TELL, ASK, AGAIN, ASK], "B<|im_end|>"),  # what stands behind the last reply changes nothing
        ([ASK, TELL, {**AGAIN, "train": True}], "B<|im_end|>"),
    ],
)
def test_the_last_reply_and_its_end_are_all_that_is_trained(tiny_processor, labels, messages, trained):
    tokenizer = tiny_processor.tokenizer
    everything = Rules(tokenizer, None, labels=labels).fit(messages).rendered
    last = Rules(tokenizer, None, labels=labels, train_on="last").fit(messages).rendered
    assert last.ids == everything.ids
    assert tokenizer.decode([label for label in last.labels if label != IGNORED]) == trained
    assert last.supervised == len(tokenizer.encode_text(trained[0])) + 1


def test_another_reply_does_not_take_the_place_of_a_marked_one(tiny_processor, tmp_path):
    marked = [ASK, TELL, ASK, {**AGAIN, "train": False}], [ASK, {**TELL, "train": False}, ASK, AGAIN]
    rules = Rules(tiny_processor.tokenizer, None, train_on="last")
    found = look_at(samples_of(tmp_path, *marked), rules, show_progress=False)
    assert found.kept.tolist() == [1] and found.supervised.tolist() == [2]
    assert "its last reply, which data.train_on: last trains, is marked as context" in str(refusal(found, rules))


def test_turns_are_left_out_at_the_front_and_the_last_is_still_trained(tiny_processor):
    rules = Rules(tiny_processor.tokenizer, 40, on_long="drop_turns", train_on="last")
    messages = [{**ASK, "content": "long " * 20}, TELL, ASK, AGAIN]
    fitted = rules.fit(messages)
    assert fitted.turns_dropped == 1 and fitted.rendered.supervised == 2


def test_what_is_shown_and_said(tiny_processor, tmp_path):
    samples = samples_of(tmp_path, [ASK, TELL, ASK, AGAIN])
    shown = preview("train", samples[0], Rules(tiny_processor.tokenizer, None, train_on="last"))
    assert "".join(piece.text for piece in shown.pieces if piece.trained) == "B<|im_end|>"
    assert "".join(piece.text for piece in shown.pieces if piece.context) == "A"
    assert shown.left_out == ["context (data.train_on: last): 1 reply before the last"]


def test_it_is_said_that_it_wins_over_the_labels():
    def said(*changes):
        text = "model: {path: x}\noutput: o\ndata: {train: {path: a.jsonl, format: messages}}"
        return describe_train_on(parse_recipe(text, [f"data.{change}" for change in changes]).data)

    assert said() == said("labels=structure") == ""
    assert "last reply" in said("train_on=last") and "does not hold" not in said("train_on=last")
    assert "data.labels: structure does not hold" in said("train_on=last", "labels=structure")


def test_the_messages_themselves_stay_as_they_are():
    messages = [ASK, TELL, ASK, AGAIN]
    assert [message.get("train") for message in train_last_only(messages)] == [None, False, None, None]
    assert "train" not in TELL

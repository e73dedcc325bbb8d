"""What is asked by `evaluate`, to the token: as the model was trained, or as the published scripts ask."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from recipes_for_tests import IMAGES, ROOT, TINY, write_recipe

from finetune.cli import main
from finetune.commands.evaluate import path_and_split
from finetune.errors import UserError
from finetune.evaluation import model_replies
from finetune.evaluation.evaluate import Evaluation, EvaluationSource, evaluate
from finetune.evaluation.tasks import find_task
from finetune.recipe import load_recipe
from finetune.replies.replies import generate_replies
from finetune.terminal import labelled, say_nothing
from finetune.training.train import train
from qwenvl import load_image
from qwenvl.checkpoint.record import ModelRecord, write_record
from qwenvl.text.chat import render_chat

DOCVQA = replace(find_task("docvqa"), max_new_tokens=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny checkpoint as an exported folder of a run: with a record of its prompt and system message."""
    folder = tmp_path_factory.mktemp("trained") / "exported"
    shutil.copytree(TINY, folder)
    record = ModelRecord(
        chat_format="chatml", prompts={"vqa": ("{question} Answer:",)}, system="You read forms.", read_from="x"
    )
    write_record(folder, record)
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """The prompts and the settings of every call for replies."""
    calls = []

    def replies(model, prompts, plan, tokenizer, images, decoding, **options):
        calls.append(([list(prompt.ids) for prompt in prompts], decoding))
        return generate_replies(model, prompts, plan, tokenizer, images, decoding, **options)

    monkeypatch.setattr(model_replies, "generate_replies", replies)
    return calls


def ask(folder, rows, model=str(TINY), task=DOCVQA, **changes) -> tuple[dict, list[dict], list[str]]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"image": str(IMAGES[0]), **row}) + "\n" for row in rows))
    given = {"sources": (EvaluationSource(str(file)),), "images_root": str(ROOT), "out": folder / "out", **changes}
    said: list[str] = []
    out = evaluate(Evaluation(model=model, task=task, **given), say=lambda *line: said.append(labelled(*line)))
    records = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    return json.loads((out / "results.json").read_text()), records, said


def raw(tokenizer, text, n_queries) -> list[int]:
    """The ids of `<img>..</img>` and a text."""
    image = [tokenizer.image_start_id, *[tokenizer.image_pad_id] * n_queries, tokenizer.image_end_id]
    return [*image, *tokenizer.encode_text(text)]


def test_an_exported_model_is_asked_as_it_was_trained(tmp_path, trained, asked, tiny_processor):
    rows = [{"question": "Total?", "answers": ["x"]}]
    results, _, said = ask(tmp_path, rows, trained, compare=str(TINY))
    user = {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "Total? Answer:"}]}
    expected = [
        render_chat(messages, tiny_processor.tokenizer, add_generation_prompt=True, n_queries=tiny_processor.n_queries)
        for messages in ([{"role": "system", "content": "You read forms."}, user], [user])
    ]
    # The model that it is compared with has no prompt on record: it gets the same one, in its own way.
    assert [prompts for prompts, _ in asked] == [[one.ids] for one in expected]
    prompts = [line.split(None, 1)[1] for line in said if line.startswith("prompt")]
    assert prompts[0] == (
        "asked by the prompt it was trained with: '{question} Answer:', after its system message 'You read forms.'"
    )
    assert prompts[1] == "asked by the same prompt: '{question} Answer:'"
    assert results["settings"]["prompt"] == "{question} Answer:" and "trained with" in results["settings"]["asked"]
    assert "It was asked by the prompt it was trained with" in (tmp_path / "out" / "evaluation.html").read_text()


@pytest.mark.slow
def test_a_run_its_adapter_and_its_merged_model_are_asked_by_the_same_prompt(tmp_path, asked):
    rows = [{"image": str(IMAGES[n]), "question": f"What {n}?", "answers": [f"answer {n}"]} for n in range(4)]
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "vqa.jsonl"), "format": "vqa", "prompt": "Look. {question}"}
    recipe = write_recipe(tmp_path / "made", data__train=[source], train__max_steps=1)
    train(load_recipe(recipe), say=say_nothing)
    run = tmp_path / "made" / "run"
    assert main(["merge", str(run), "--to", str(tmp_path / "merged")]) == 0
    lines = []
    for number, model in enumerate((run, run / "adapter", tmp_path / "merged")):
        _, _, said = ask(tmp_path, rows[:2], str(model), out=tmp_path / f"out{number}")
        lines += [line for line in said if line.startswith("prompt")]
    assert lines == ["prompt      asked by the prompt it was trained with: 'Look. {question}'"] * 3
    assert asked[0][0] == asked[1][0] == asked[2][0]


def test_replies_to_another_prompt_are_not_gone_on_with(tmp_path, trained):
    rows = [{"question": "Total?", "answers": ["x"]}]
    ask(tmp_path, rows, trained)
    with pytest.raises(UserError) as raised:
        ask(tmp_path, rows, trained, prompt="{question}")
    assert 'settings.prompt: "{question} Answer:" -> "{question}"' in str(raised.value)
    with pytest.raises(UserError, match=r"task\.published: false -> true"):
        ask(tmp_path, rows, trained, prompt="published")


def test_published_a_chat_model_is_asked_in_raw_text_to_the_end(tmp_path, trained, asked, tiny_processor):
    rows = [{"question": "Total?", "answers": ["x"]}]
    results, records, said = ask(tmp_path, rows, trained, prompt="published")
    tokenizer = tiny_processor.tokenizer
    [(prompts, decoding)] = asked
    assert prompts == [raw(tokenizer, "Total? Answer:", tiny_processor.n_queries)]
    assert decoding.stop_ids == (tokenizer.eod_id,) and decoding.stop_texts == ()
    assert (decoding.min_new_tokens, decoding.max_new_tokens) == (1, 3)
    assert "asked as a base model (--prompt published)" in said[0]
    assert said[1].endswith("as the published scripts do, in raw text: '<img>..</img>{question} Answer:'")
    assert results["settings"]["style"] == "base" and records[0]["cut"] is True and results["cut"] == 1
    with pytest.raises(UserError, match=r"--prompt published asks every model in raw text.*leave out --style chat"):
        ask(tmp_path, rows, trained, prompt="published", style="chat", out=tmp_path / "chat")


def test_published_the_answer_to_a_choice_is_the_letter_of_least_loss(tmp_path, asked, tiny_model, tiny_processor):
    """Each letter after the prompt, as the published script has it: the mean cross-entropy of ` A`, ` B`, ..."""
    rows = [
        {
            "question": f"Which{'?' * n}",
            "options": ["dog", "cat", "owl", "eel"][: 2 + n % 3],
            "answer": "B",
            "hint": hint,
        }
        for n, hint in enumerate(["", "Read.", None, "x"])
    ]
    _, records, said = ask(tmp_path, rows, task=find_task("multiple_choice"), prompt="published")
    tokenizer, image = tiny_processor.tokenizer, load_image(IMAGES[0])
    pixels = tiny_processor.image_processor([image], do_normalize=False, return_tensors="pt")
    assert any("the answer is the likeliest letter" in line for line in said)
    letters = []
    for row, record in zip(rows, records, strict=True):
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["options"], strict=False))
        text = f"Context: {row['hint'] or 'N/A'}\nQuestion: {row['question']}\nOptions: {options}\nAnswer:"
        ids = raw(tokenizer, text, tiny_processor.n_queries)
        assert ids in asked[0][0]
        losses = []
        for letter in "ABCD"[: len(row["options"])]:
            target = tokenizer.encode_text(f" {letter}")
            logits = tiny_model(input_ids=torch.tensor([ids + target]), **pixels).logits[0, -len(target) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target)).item())
        assert record["prediction"] == "ABCD"[losses.index(min(losses))]
        assert record["score"] == float(record["prediction"] == "B") and "unread" not in record
        letters.append(record["prediction"])
    assert len(letters) == 4


def test_replies_that_cannot_be_read_are_counted(tmp_path):
    """The tiny model has random weights: what it says is no choice and no number."""
    choices = [{"question": f"Which {n}?", "options": ["dog", "cat"], "answer": "A"} for n in range(3)]
    results, records, said = ask(tmp_path, choices, task=replace(find_task("multiple_choice"), max_new_tokens=2))
    unread = [record for record in records if "unread" in record]
    assert unread and all(record["score"] == 0 for record in unread)
    assert sum(results["unread"].values()) == len(unread)
    line = f"{len(unread)} replies choose none of the options, or several: counted as wrong"
    assert any(one.startswith("unread") and one.endswith(line) for one in said)
    assert "choose none of the options" in (tmp_path / "out" / "evaluation.html").read_text()
    assert results["cut"] == sum("cut" in record for record in records)


def test_answers_that_the_metric_changes_first_are_told(tmp_path):
    rows = [{"question": f"Who {n}?", "answers": ["Paris"] * 10 if n else ["rome"] * 10} for n in range(2)]
    results, _, _ = ask(tmp_path, rows, task=replace(find_task("textvqa"), max_new_tokens=2))
    assert any(note.startswith("1 questions cannot be answered right: vqa_score") for note in results["notes"])


def write(file, count, first=0):
    lines = [
        {"image": str(IMAGES[n % 5]), "question": f"What {n}?", "answers": [f"answer {n}"], "questionId": n}
        for n in range(first, first + count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_the_command_draws_solved_examples_from_another_source(tmp_path, asked, tiny_processor, capfd):
    """Also for a chat model, which published is asked in raw text."""
    rows, train = write(tmp_path / "rows.jsonl", 2), write(tmp_path / "train.jsonl", 5, first=10)
    arguments = ["evaluate", TINY, "--task", "docvqa", "--data", rows, "--images-root", ROOT, "--prompt", "published"]
    arguments += ["--shots", "2", "--shots-from", train, "--max-new-tokens", "2", "--out", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    assert f"examples    2 solved ones before each question, from {train}" in capfd.readouterr().out
    [(prompts, _)] = asked
    for number, ids in enumerate(prompts):
        text = tiny_processor.tokenizer.decode([id for id in ids if id != tiny_processor.tokenizer.image_pad_id])
        *shown, own = text.split("<img></img>")[1:]
        assert own == f"What {number}? Answer:" and len(shown) == 2
        for example in shown:
            n = int(example.removeprefix("What ").split("?")[0])
            assert example == f"What {n}? Answer: answer {n}" and n % 5 != number


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--task", "docvqa", "--shots-from", "x.jsonl"), "--shots-from says where solved examples come from"),
        (("--task", "screenspot", "--prompt", "published"), "the published scripts have nothing like task screenspot"),
        (("--task", "docvqa", "--prompt", "publshed"), "must hold {question}: 'publshed'"),
        (("--task", "docvqa", "--prompt", " "), "--prompt is blank"),
        (
            ("--task", "multiple_choice", "--prompt", "published", "--max-new-tokens", "4"),
            "--max-new-tokens has no use",
        ),
        (("--task", "flickr30k", "--prompt", "published", "--max-new-tokens", "4"), "no fewer than 8 new tokens"),
        (("--task", "docvqa", "--prompt", "trained"), "nothing says with which prompt it was trained"),
        (("--task", "docvqa", "--style", "base", "--shots", "5"), "of its 2 questions, 1 are about other images"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(tmp_path, capfd, arguments, told):
    rows = write(tmp_path / "rows.jsonl", 2)
    given = ["evaluate", TINY, "--data", rows, "--images-root", ROOT, "--out", tmp_path / "out", *arguments]
    assert main([str(argument) for argument in given]) == 2
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train.jsonl", ("train.jsonl", None)),
        ("lmms-lab/DocVQA:validation", ("lmms-lab/DocVQA", "validation")),
        ("C:/data/train", ("C:/data/train", None)),
        ("train:", ("train:", None)),
    ],
)
def test_a_source_of_examples_may_name_its_split(text, parts):
    assert path_and_split(text) == parts

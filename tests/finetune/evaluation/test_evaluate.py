"""`finetune evaluate` in this process, on the tiny checkpoint: what it writes, and how it goes on after a stop."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from adapters_for_tests import make_adapter
from changed_bases import edit_json, flip_a_bit
from recipes_for_tests import IMAGES, ROOT, TINY, finetune

from finetune.data.sample import DataError
from finetune.errors import InputError, UserError
from finetune.evaluation import model_replies
from finetune.evaluation.evaluate import Evaluation, EvaluationSource, evaluate
from finetune.evaluation.tasks import custom_task, find_task
from finetune.metrics import anls
from finetune.replies.replies import generate_replies
from finetune.terminal import labelled
from qwenvl import QwenVLForConditionalGeneration, base_check, load_image
from qwenvl.base_check import identify_base
from qwenvl.checkpoint.identity import identity_to_json
from qwenvl.images.images import ImageError

NEW = 8


def write_questions(file, count=9, hidden=False, **more):
    """Questions of several lengths, three on each image; a group for every second one."""
    lines = []
    for n in range(count):
        row = {"questionId": 100 + n, "image": str(IMAGES[n // 3 % len(IMAGES)])}
        row |= {"question": f"What is number {n}? " * (1 + n % 3), "answers": [] if hidden else [f"answer {n}", "7"]}
        lines.append(json.dumps(row | {name: values[n] for name, values in more.items()}))
    file.write_text("\n".join(lines) + "\n")
    return file


def evaluation(folder, file="questions.jsonl", **changes) -> Evaluation:
    task = changes.pop("task", replace(find_task("docvqa"), max_new_tokens=NEW))
    columns = changes.pop("columns", {})
    given = {"images_root": str(ROOT), "out": folder / "out", "batch_tokens": 1200}
    source = EvaluationSource(str(folder / file), columns=columns)
    return Evaluation(**{"model": str(TINY), "task": task, "sources": (source,), **given, **changes})


def run(folder, **changes) -> tuple[dict, list[dict], list[str]]:
    """results.json, predictions.jsonl and what was said."""
    said: list[str] = []
    out = evaluate(evaluation(folder, **changes), say=lambda label, text="": said.append(labelled(label, text)))
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return json.loads((out / "results.json").read_text()), [json.loads(line) for line in lines], said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_questions(folder / "questions.jsonl")
    return folder, *run(folder)


def test_replies_and_scores_are_those_of_one_question_at_a_time(whole, tiny_model, tiny_processor):
    _, results, records, _ = whole
    assert [record["id"] for record in records] == [str(100 + n) for n in range(9)]
    for n, record in enumerate(records):
        question = [{"type": "image", "image": str(IMAGES[n // 3])}, {"type": "text", "text": record["question"]}]
        inputs = tiny_processor.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
        ids = tiny_model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert record["reply"] == tiny_processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert record["score"] == anls(record["prediction"], [f"answer {n}", "7"])
        assert record["answers"] == [f"answer {n}", "7"]
    assert results["score"] == pytest.approx(sum(record["score"] for record in records) / 9)
    assert results["questions"] == results["of"] == 9 and results["unreadable"] == []


def test_the_end_is_said(whole):
    folder, results, _, said = whole
    assert f"anls        {results['score']:.4f} (95% " in "\n".join(said)
    assert any(line.startswith("note") and "random weights" in line for line in said)
    for name in ("predictions.jsonl", "results.json", "evaluation.html"):
        assert any(line.endswith(str(folder / "out" / name)) for line in said)
    assert results["speed"]["replies"] == 9 and results["speed"]["examples_per_second"] > 0
    assert results["identity"]["settings"]["style"] == "chat"


def stop_after(count: int):
    """Replies as they come, until somebody stops the program."""

    def replies(*arguments, **options):
        for number, reply in enumerate(generate_replies(*arguments, **options)):
            if number == count:
                raise KeyboardInterrupt
            yield reply

    return replies


def test_an_interrupted_evaluation_goes_on(whole, tmp_path, monkeypatch):
    """Also after a half last line, and the other way of cutting batches; what is there is not asked again."""
    write_questions(tmp_path / "questions.jsonl")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_replies, "generate_replies", stop_after(4))
        run(tmp_path)
    file = tmp_path / "out" / "predictions.jsonl"
    assert len(file.read_text().splitlines()) == 4
    with file.open("a") as opened:
        opened.write('{"number": 8, "id": "10')
    asked = []
    monkeypatch.setattr(
        model_replies, "plan_replies", lambda prompts, seen: asked.append(len(prompts)) or plan_before(prompts, seen)
    )
    _, records, said = run(tmp_path, batch_tokens=4000)
    assert asked == [5] and without_place(records) == without_place(whole[2])
    assert any("4 of 9 replies" in line for line in said)
    # All of them are there now: no model is loaded, and the speed of the last part stays.
    monkeypatch.setattr(model_replies, "load_model", None)
    again, records, _ = run(tmp_path)
    assert without_place(records) == without_place(whole[2]) and again["speed"]["replies"] == 5


plan_before = model_replies.plan_replies


def without_place(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "origin"} for record in records]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": replace(find_task("docvqa"), max_new_tokens=3)}, "task.max_new_tokens: 8 -> 3"),
        ({"style": "base"}, 'settings.style: "chat" -> "base"'),
        ({"sample": 4}, "data.questions: 9 -> 4"),
        ({"dtype": "bfloat16"}, "settings.dtype"),
    ],
)
def test_another_evaluation_in_the_folder_is_refused(whole, changes, told, monkeypatch):
    monkeypatch.setattr(model_replies, "load_model", None)
    with pytest.raises(UserError) as raised:
        run(whole[0], **changes)
    assert told in str(raised.value) and "another --out" in str(raised.value)


def test_other_weights_are_refused(whole, tmp_path, monkeypatch):
    other = changed_model(tmp_path / "other")
    monkeypatch.setattr(model_replies, "load_model", None)
    with pytest.raises(UserError, match=r"model\.base: "):
        run(whole[0], model=str(other))


def test_an_adapter_on_a_base_that_was_changed_is_refused(tmp_path):
    base, file = tmp_path / "base", write_questions(tmp_path / "questions.jsonl", count=1)
    shutil.copytree(TINY, base)
    make_adapter(tmp_path / "adapter", base=base)
    flip_a_bit(base / "model.safetensors")
    done = ["--task", "docvqa", "--data", file, "--images-root", ROOT, "--out", tmp_path / "out"]
    done = finetune("evaluate", tmp_path / "adapter", *done, check=False)
    assert done.returncode == 2 and "base differs: other weights (fingerprint was " in done.stderr
    flip_a_bit(base / "model.safetensors")
    edit_json(base / "config.json", visual={"image_size": 140})
    with pytest.raises(InputError, match=r"base differs: config\.json: visual\.image_size was 112, is 140"):
        run(tmp_path, model=str(tmp_path / "adapter"), out=tmp_path / "again")


def test_a_base_is_read_once(tmp_path, monkeypatch):
    """Of an adapter and of what it is compared with, and to check that it is the adapter's."""
    write_questions(tmp_path / "questions.jsonl", count=1)
    make_adapter(tmp_path / "adapter")
    count, original = [], base_check.hash_tensors
    monkeypatch.setattr(base_check, "hash_tensors", lambda *a, **b: count.append(1) or original(*a, **b))
    results, *_ = run(tmp_path, model=str(tmp_path / "adapter"), compare=str(TINY))
    assert len(count) == 1
    known = identity_to_json(identify_base(TINY))
    assert results["identity"]["model"]["base"] == known
    # An evaluation from before knows some values of each tensor.
    file = tmp_path / "out" / "evaluation.json"
    stored = json.loads(file.read_text())
    stored["model"]["base"] = known["sampled"]
    file.write_text(json.dumps(stored))
    run(tmp_path, model=str(tmp_path / "adapter"), compare=str(TINY))
    stored["model"] = {"adapter": None}
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"model\.base"):
        run(tmp_path, model=str(tmp_path / "adapter"), compare=str(TINY))


def test_a_damaged_line_is_named(whole, tmp_path):
    write_questions(tmp_path / "questions.jsonl")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text((whole[0] / "out" / "evaluation.json").read_text())
    (tmp_path / "out" / "predictions.jsonl").write_text('{"number": 0}\n{"num\n')
    with pytest.raises(UserError, match=r"predictions.jsonl, line 2: is damaged"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("taken", "taken: "),
        ("taken/below", "taken/below: "),
        ("link", "is a symbolic link to .*gone"),
        ("n" * 300, "too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_weights_load(tmp_path, monkeypatch, name, told):
    write_questions(tmp_path / "questions.jsonl")
    (tmp_path / "taken").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(model_replies, "load_model", None)
    with pytest.raises(UserError, match=rf"cannot write .*{told}.*with --out"):
        run(tmp_path, out=tmp_path / name)


def test_damaged_files_are_named_before_weights_load(whole, tmp_path, monkeypatch):
    write_questions(tmp_path / "questions.jsonl")
    monkeypatch.setattr(model_replies, "load_model", None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "compared").write_text("x")
    with pytest.raises(UserError, match="compared is not a folder"):
        run(tmp_path, compare=str(TINY))
    (out / "evaluation.json").write_text((whole[0] / "out" / "evaluation.json").read_text())
    (out / "predictions.jsonl").write_text("")
    (out / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json is not JSON .*: remove it"):
        run(tmp_path)
    (out / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match=r"evaluation\.json is not a JSON object: give another --out"):
        run(tmp_path)


def changed_model(folder):
    """The tiny checkpoint with other weights in its head."""
    torch.manual_seed(0)
    model = QwenVLForConditionalGeneration.from_pretrained(TINY)
    model.lm_head.weight.data += 0.5 * torch.randn_like(model.lm_head.weight)
    model.save_pretrained(folder)
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def test_two_models_are_compared_on_the_same_questions(whole, tmp_path):
    file = write_questions(tmp_path / "questions.jsonl")
    other = changed_model(tmp_path / "other")
    # The other model's own replies are right, so it is better on every question that the first gets wrong.
    _, replies, _ = run(tmp_path, model=str(other), out=tmp_path / "alone")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    right = [{**row, "answers": [reply["prediction"]]} for row, reply in zip(rows, replies, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in right))
    results, records, said = run(tmp_path, model=str(other), compare=str(TINY))
    assert [record["reply"] for record in records] == [record["reply"] for record in replies]
    assert results["score"] == 1.0
    compared = results["compared"]
    stored = [json.loads(line) for line in (tmp_path / "out" / "compared" / "predictions.jsonl").open()]
    assert [record["reply"] for record in stored] == [record["reply"] for record in whole[2]]
    worse = sum(record["score"] < 1 for record in stored)
    assert compared["better"] == worse > 0 and compared["worse"] == 0
    assert compared["difference"] == pytest.approx(1 - compared["score"])
    low, high = compared["difference_interval"]
    assert 0 < low <= compared["difference"] <= high <= 1
    assert any(line.startswith("difference  +") for line in said)
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "Most gained on the compared model" in page and str(TINY) in page


def test_groups_and_their_mean(tmp_path):
    groups = [0, 0, 0, 0, 0, 0, 0, 1, 1]
    write_questions(tmp_path / "questions.jsonl", human_or_machine=groups)
    task = replace(find_task("chartqa"), max_new_tokens=3)
    columns = {"question": "question", "answers": "answers"}
    results, records, _ = run(tmp_path, task=task, columns=columns)
    assert [record["group"] for record in records] == ["augmented" if group else "human" for group in groups]
    assert {name: group["questions"] for name, group in results["groups"].items()} == {"augmented": 2, "human": 7}
    scores = [group["score"] for group in results["groups"].values()]
    assert results["score"] == pytest.approx(sum(scores) / 2)


def test_hidden_answers_make_a_submission(tmp_path):
    write_questions(tmp_path / "questions.jsonl", hidden=True)
    results, records, said = run(tmp_path)
    assert "score" not in results and all("score" not in record for record in records)
    submitted = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert submitted == [{"questionId": 100 + n, "answer": record["prediction"]} for n, record in enumerate(records)]
    assert any("answers are hidden" in line for line in said)


def test_a_damaged_image_is_refused_or_counts_as_wrong(tmp_path):
    file = write_questions(tmp_path / "questions.jsonl")
    (tmp_path / "half.png").write_bytes(IMAGES[0].read_bytes()[:400])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[4] |= {"image": str(tmp_path / "half.png")}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for on_bad_row in ("error", "skip"):  # which is of rows that cannot be asked
        with pytest.raises(ImageError, match=r"questions.jsonl, row 5.*half.png.*--bad-image wrong counts"):
            run(tmp_path, images_root="/", on_bad_row=on_bad_row)
    results, records, said = run(tmp_path, images_root="/", on_bad_image="wrong")
    assert [record["id"] for record in records if "unreadable" in record] == ["104"]
    assert records[4]["score"] == 0 and results["unreadable"][0]["id"] == "104"
    assert any(line.startswith("unreadable  1 questions") for line in said)
    assert "half.png" in (tmp_path / "out" / "evaluation.html").read_text()


def test_a_missing_image_is_refused_or_counts_as_wrong(tmp_path):
    file = write_questions(tmp_path / "questions.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2] |= {"image": str(tmp_path / "gone.png")}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"questions.jsonl, row 3, images\[0\]: .*gone.png"):
        run(tmp_path, images_root="/")
    results, records, _ = run(tmp_path, images_root="/", on_bad_image="wrong")
    assert [record["id"] for record in records if "unreadable" in record] == ["102"]
    assert records[2]["score"] == 0 and len(records) == len(rows) == results["questions"]


def test_a_base_model_is_asked_in_raw_text_with_solved_examples(tmp_path):
    write_questions(tmp_path / "questions.jsonl")
    results, records, said = run(tmp_path, style="base", shots=2)
    assert results["settings"]["shots"] == 2 and "asked as a base model" in said[0]
    assert not any("\n" in record["prediction"] for record in records)
    plain = run(tmp_path, style="base", out=tmp_path / "plain")[1]
    assert [record["reply"] for record in plain] != [record["reply"] for record in records]


def test_a_sample_is_the_same_for_a_seed_and_another_for_another(tmp_path, monkeypatch):
    write_questions(tmp_path / "questions.jsonl")
    ids = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        results, records, _ = run(tmp_path, sample=4, seed=seed, out=out, task=custom_task("anls", None, 2))
        ids[seed] = [record["question"] for record in records]
        assert results["questions"] == 4 and results["of"] == 9
    assert len(set(ids[0])) == 4 and ids[0] != ids[1]
    with pytest.raises(UserError, match="holds another evaluation"):
        run(tmp_path, sample=4, seed=1, out=tmp_path / "0", task=custom_task("anls", None, 2))


def test_the_page_draws_gold_and_predicted_boxes(tmp_path):
    width, height = load_image(IMAGES[0]).size
    row = {"image": str(IMAGES[0]), "phrase": "the <b>box</b>", "box": [0, 0, width / 2, height / 2]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    task = custom_task("grounding", max_new_tokens=NEW, format="grounding")
    source = EvaluationSource(str(tmp_path / "questions.jsonl"), box_form="xyxy")
    results, records, _ = run(tmp_path, task=task, sources=(source,))
    assert results["metric"] == "grounding" and records[0]["box"] == [0, 0, width / 2, height / 2]
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count("<img ") == 1 and "the reply has no box" in page
    assert "the &lt;b&gt;box&lt;/b&gt;" in page and "<b>box" not in page


def test_the_command(tmp_path):
    """The real one, once: arguments to files."""
    write_questions(tmp_path / "mine.jsonl", count=3)
    rows = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    rows = [{"image": row["image"], "query": row["question"], "label": row["answers"]} for row in rows]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = finetune(
        *("evaluate", TINY, "--task", "custom", "--metric", "exact_match", "--data", tmp_path / "mine.jsonl"),
        *("--column", "question=query", "--column", "answers=label", "--images-root", ROOT, "--max-new-tokens", "2"),
        *("--out", tmp_path / "out"),
    )
    assert "exact_match" in done.stdout and "custom: exact_match on 3 questions" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["questions"] == 3

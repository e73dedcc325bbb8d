"""The images of a run: those that it opens, each once, and no others."""

import json
from pathlib import Path

import pytest
from recipes_for_tests import IMAGES, write_recipe

from finetune.data.reading import read_checked, rules_of
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.recipe import load_recipe
from finetune.vision_cache.cache import ImageHandles
from finetune.vision_cache.run_images import RunImages, find_images, images_of_run

HANDLES = ImageHandles("", "")


def found(file: Path, processor, *overrides: str, task: bool = False, **how) -> list[str]:
    """File names of the distinct images, in order."""
    recipe = load_recipe(file, overrides)
    data = read_checked(recipe, processor, show_progress=False, processes=1)
    samples, checked = ({name: part[number] for name, part in data.items()} for number in (0, 1))
    questions = TaskEvaluation(recipe, processor).questions if task else ()
    images = images_of_run(recipe, rules_of(recipe, processor), samples, checked, questions)
    entries = find_images(images, HANDLES, show_progress=False, processes=1, **how)
    for handle, entry in entries.items():
        request = images.request(entry)
        assert HANDLES.of(request.source, request.access) == handle
    return [Path(images.request(entry).source).name for entry in entries.values()]


def write_rows(file: Path, *rows: list[int], turns: bool = False):
    """A row of images each: all in its one question, or one in each of its turns."""
    lines = []
    for images in rows:
        parts = [{"type": "image", "image": str(IMAGES[number])} for number in images]
        messages = []
        for shown in [[part] for part in parts] if turns else [parts]:
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": "What?"}]})
            messages.append({"role": "assistant", "content": "It."})
        lines.append(json.dumps({"messages": messages}))
    file.write_text("".join(line + "\n" for line in lines))


def names(*numbers: int) -> list[str]:
    return [IMAGES[number].name for number in numbers]


def test_each_once_in_the_order_of_the_data(tmp_path, tiny_processor):
    file = write_recipe(tmp_path)
    write_rows(tmp_path / "train.jsonl", [3, 1], [], [1], [0, 3, 0], [2])
    assert found(file, tiny_processor) == names(3, 1, 0, 2)


def test_a_share_of_them(tmp_path, tiny_processor, monkeypatch):
    monkeypatch.setattr("finetune.vision_cache.run_images.CHUNK", 1)
    file = write_recipe(tmp_path)
    write_rows(tmp_path / "train.jsonl", [3], [1], [0], [3], [2])
    assert found(file, tiny_processor, share=(0, 2)) == names(3, 0, 2)
    assert found(file, tiny_processor, share=(1, 2)) == names(1, 3)


def test_images_of_turns_that_are_left_out_are_not_opened(tmp_path, tiny_processor):
    file = write_recipe(tmp_path)
    write_rows(tmp_path / "train.jsonl", [3, 1, 0], [2, 4, 1], turns=True)
    assert found(file, tiny_processor) == names(3, 1, 0, 2, 4)
    assert found(file, tiny_processor, "data.max_length=640", "data.on_long=drop_turns") == names(1, 0, 4)
    assert found(file, tiny_processor, "data.max_length=320", "data.on_long=drop_turns") == names(0, 1)


def test_rows_that_a_weight_leaves_out_are_not_opened(tmp_path, tiny_processor):
    file = write_recipe(tmp_path)
    write_rows(tmp_path / "train.jsonl", [0], [1], [2], [3])
    half = ["data.train.0.weight=0.5", "train.max_steps=-1"]
    assert len(found(file, tiny_processor, *half, "train.num_train_epochs=1")) == 2
    assert len(found(file, tiny_processor, *half, "train.num_train_epochs=2")) == 4, "each epoch has another half"


@pytest.mark.parametrize(("limit", "predictions", "expected"), [(1, 0, [4, 0]), (1, 1, [4, 0]), (2, 0, [4, 0, 1])])
def test_of_the_evaluation_what_it_looks_at(tmp_path, tiny_processor, limit, predictions, expected):
    file = write_recipe(tmp_path)
    write_rows(tmp_path / "train.jsonl", [4])
    write_rows(tmp_path / "eval.jsonl", [0], [1], [2])
    evaluate = f"{{data: {{path: {tmp_path / 'eval.jsonl'}, format: messages}}, predictions: {predictions}}}"
    assert found(file, tiny_processor, f"evaluate={evaluate}", f"evaluate.limit={limit}") == names(*expected)
    # Replies are shown of other rows than the loss may be of.
    assert found(file, tiny_processor, f"evaluate={evaluate}", "evaluate.limit=1", "evaluate.predictions=3") == names(
        4, 0, 1, 2
    )


def test_of_a_task_the_questions_that_are_drawn(tmp_path, tiny_processor):
    file = write_recipe(tmp_path)
    write_rows(tmp_path / "train.jsonl", [4])
    rows = [{"image": str(IMAGES[number]), "question": "What?", "answers": ["a"]} for number in (0, 1, 2, 3)]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{{data: {{path: {tmp_path / 'eval.jsonl'}, format: vqa}}, task: docvqa, sample: 2, predictions: 0}}"
    images = found(file, tiny_processor, f"evaluate={data}", "evaluate.limit=4", task=True)
    assert images == names(4, 0, 1, 2, 3)
    only = found(file, tiny_processor, f"evaluate={data}", "evaluate.limit=1", task=True)
    assert only == names(4, 0)


def test_of_nothing():
    assert find_images(RunImages([]), HANDLES, show_progress=False) == {}
    assert len(RunImages([[], []])) == 0

"""`data.split`: whole documents, the same ones for the same seed, and none in both parts."""

import json
import random

import datasets
import pytest
import yaml
from PIL import Image
from recipes_for_tests import TINY
from said import collect

from finetune.data.prepare import Group, prepare, snippet
from finetune.data.reading import look_for_overlap, read_checked
from finetune.data.sample import DataError
from finetune.data.samples import Samples
from finetune.evaluation.questions import Questions
from finetune.evaluation.tasks import custom_task
from finetune.recipe import RecipeError, parse_recipe

TEXT = """
model: {path: examples/tiny}
output: runs/x
data: {train: {path: %s, format: vqa, weight: 2.0, limit: 1000}, split: %s}
evaluate: %s
"""


def recipe_of(path, split="{eval: 0.2}", evaluate="{data: split, task: custom, metric: anls}"):
    return parse_recipe(TEXT % (path, split, evaluate))


def write(path, documents, rows=3):
    lines = [
        {"image": f"{name}.png", "question": f"Q{number}", "answers": "a", "doc": f"d{name}"}
        for name in documents
        for number in range(rows)
    ]
    random.Random(0).shuffle(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def documents(samples):
    return {sample.messages[0]["content"][0]["image"].rsplit("/", 1)[1] for sample in samples}


def parts(recipe):
    return Samples(recipe.data.train), Samples(recipe.evaluate.data)


def test_a_split_is_written_out_and_reads_back(tmp_path):
    recipe = recipe_of(write(tmp_path / "a.jsonl", range(10)))
    (train,), (evaluate,) = recipe.data.train, recipe.evaluate.data
    assert recipe.data.split is None
    assert train.part.model_dump() == {"eval": 0.2, "by": "image", "seed": 0, "take": "train"}
    assert evaluate.part.take == "eval" and (evaluate.limit, evaluate.weight) == (1000, 1.0)
    assert parse_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/train.jsonl", "b/train.jsonl"], ["a_train", "b_train"]),
        (["x/a/train.jsonl", "y/a/train.jsonl", "b.jsonl"], ["x_a_train", "y_a_train", "b"]),
        (["a/train.jsonl", "a/train.jsonl"], ["train_1", "train_2"]),
        (["a/train.jsonl", "a/test.jsonl"], [None, None]),
        (["a/data", "b/data"], ["a_data", "b_data"]),
    ],
)
def test_sources_of_the_same_file_name_are_told_apart(paths, names):
    sources = ", ".join(f"{{path: {path}, format: vqa}}" for path in paths)
    recipe = parse_recipe(
        f"{{model: {{path: examples/tiny}}, output: runs/x, data: {{train: [{sources}], split: {{eval: 0.2}}}}, "
        "evaluate: {data: split, task: custom, metric: anls}}"
    )
    assert [source.name for source in recipe.evaluate.data] == names
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_documents_are_whole_and_in_one_part(tmp_path):
    train, evals = parts(recipe_of(write(tmp_path / "a.jsonl", range(200))))
    assert len(train) + len(evals) == 600 and not documents(train) & documents(evals)
    assert 25 <= len(documents(evals)) <= 55  # of 200, drawn with probability 0.2
    assert len(evals) == 3 * len(documents(evals))
    assert [str(sample.origin) for sample in evals.scan(0, len(evals))] == [str(sample.origin) for sample in evals]


def test_rows_that_are_added_move_no_others(tmp_path):
    few = [documents(samples) for samples in parts(recipe_of(write(tmp_path / "a.jsonl", range(50))))]
    many = parts(recipe_of(write(tmp_path / "a.jsonl", range(80), rows=4)))
    for before, after in zip(few, many, strict=True):
        assert before < documents(after)
    other = parts(recipe_of(tmp_path / "a.jsonl", split="{eval: 0.2, seed: 1}"))
    assert documents(other[1]) != documents(many[1])
    assert other[0].fingerprint(images=False) != many[0].fingerprint(images=False)


def test_rows_with_several_images_join_documents(tmp_path):
    draw = random.Random(1)
    rows = []
    for chain in range(60):
        for _ in range(3):
            images = [f"{chain}-{number}.png" for number in draw.sample(range(4), 2)]
            turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "b"}]
            rows.append({"images": images, "messages": turns})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TEXT.replace("format: vqa", "format: messages") % (tmp_path / "a.jsonl", "{eval: 0.3}", "{data: split}")
    seen = []
    for samples in parts(parse_recipe(text)):
        seen.append({part["image"] for s in samples for part in s.messages[0]["content"] if part["type"] == "image"})
    assert all(seen) and not seen[0] & seen[1]


def test_images_inside_the_data_are_known_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    images = [{"bytes": b"%02d same length" % (number % 20), "path": f"{number}.png"} for number in range(60)]
    rows = {"image": images, "question": [str(n) for n in range(60)], "answers": ["a"] * 60}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    train, evals = parts(recipe_of(tmp_path / "a.parquet", split="{eval: 0.4}"))
    seen = [{sample.messages[0]["content"][0]["image"]["bytes"] for sample in samples} for samples in (train, evals)]
    assert len(train) + len(evals) == 60 and len(seen[0]) + len(seen[1]) == 20 and not seen[0] & seen[1]


def test_pages_and_other_spellings_are_one_document(tmp_path):
    names = [["a.pdf#1", "a.pdf#2", "./a.pdf"], ["s\\b.png", "s/b.png", "s/./b.png"]]
    for group in names:
        rows = [{"image": name, "question": "Q", "answers": "a"} for name in group]
        rows += [{"image": f"{n}.png", "question": "Q", "answers": "a"} for n in range(40)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train, _ = parts(recipe_of(tmp_path / "a.jsonl"))
        assert sum(sample.origin.row <= 3 for sample in train) in (0, 3)


@pytest.mark.parametrize("row_format", ["messages", "llava"])
def test_an_image_is_found_wherever_a_format_reads_it(tmp_path, row_format):
    rows = []
    for number in range(120):
        row = {"images": [f"{number % 40}.png"]}
        if row_format == "llava":
            turns = [{"from": "human", "value": f"<image>Q{number}"}, {"from": "gpt", "value": "a"}]
            rows.append({**row, "conversations": turns})
        else:
            # The later rows have the mark twice: where it is text, it is no place.
            asked = f"Q{number} <image>" + (" <image>" if number >= 80 else "")
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a"}]
            rows.append({**row, "messages": turns})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TEXT.replace("format: vqa", f"format: {row_format}") % (
        tmp_path / "a.jsonl",
        "{eval: 0.3}",
        "{data: split}",
    )
    recipe = parse_recipe(text)
    numbers = [
        {sample.origin.row for sample in Samples(sources, text_places=False).scan(0, count)}
        for sources, count in ((part, len(Samples(part))) for part in (recipe.data.train, recipe.evaluate.data))
    ]
    assert all(numbers) and sum(map(len, numbers)) == 120
    assert not {(row - 1) % 40 for row in numbers[0]} & {(row - 1) % 40 for row in numbers[1]}


def test_a_cut_by_a_column(tmp_path):
    write(tmp_path / "a.jsonl", range(40))
    train, evals = parts(recipe_of(tmp_path / "a.jsonl", split="{eval: 0.5, by: doc}"))
    assert not documents(train) & documents(evals) and len(train) + len(evals) == 120
    with pytest.raises(DataError, match=r"a.jsonl, row 1: has no page, by which data.split cuts"):
        parts(recipe_of(tmp_path / "a.jsonl", split="{eval: 0.5, by: page}"))


def test_a_part_without_documents_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", [1])
    with pytest.raises(DataError, match=r"none of the 1 documents in its 3 rows falls into the part to (train|eval)"):
        parts(recipe_of(tmp_path / "a.jsonl"))


def test_questions_are_those_of_the_part(tmp_path):
    recipe = recipe_of(write(tmp_path / "a.jsonl", range(60)))
    _, evals = parts(recipe)
    questions = Questions(recipe.evaluate.data[0], custom_task("anls", format="vqa"), look_for_images=False)
    assert [question.origin for question in questions] == [sample.origin for sample in evals]


def test_the_limit_counts_before_the_cut(tmp_path):
    write(tmp_path / "a.jsonl", range(60))
    text = TEXT.replace("limit: 1000", "limit: 90") % (tmp_path / "a.jsonl", "{eval: 0.3}", "{data: split}")
    train, evals = parts(parse_recipe(text))
    assert len(train) + len(evals) == 90 and {sample.origin.row for sample in [*train, *evals]} == set(range(1, 91))


def test_the_evaluation_may_be_left_out(tmp_path):
    recipe = parse_recipe(TEXT % (write(tmp_path / "a.jsonl", range(60)), "{eval: 0.3}", "null"))
    assert recipe.evaluate is None and len(Samples(recipe.data.train)) < 180
    assert parse_recipe(recipe_of(tmp_path / "a.jsonl").to_yaml(), ["evaluate=null"]).data.train[0].part is not None


@pytest.mark.parametrize(
    ("split", "evaluate", "key", "reason"),
    [
        ("null", "{data: split}", "evaluate.data", "there is no data.split"),
        ("{eval: 0.1}", "{data: {path: b.jsonl, format: vqa}}", "data.split", "evaluate.data names other data"),
        ("{eval: 1.5}", "{data: split}", "data.split.eval", "found 1.5"),
        ("{evl: 0.1}", "{data: split}", "data.split.evl", "unknown key"),
        ("{eval: 0.1, take: eval}", "{data: split}", "data.split.take", "unknown key"),
    ],
)
def test_what_does_not_go_together(split, evaluate, key, reason):
    with pytest.raises(RecipeError) as caught:
        recipe_of("a.jsonl", split, evaluate)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert reason in str(caught.value)


def test_a_part_of_its_own_and_a_split():
    source = "{path: a.csv, format: vqa, part: {eval: 0.1, take: eval}}"
    with pytest.raises(RecipeError, match=r"data.split cuts all sources"):
        parse_recipe(f"model: {{path: x}}\noutput: y\ndata: {{split: {{eval: 0.1}}, train: {source}}}")


def test_prepared_parts_are_not_cut_again(tmp_path):
    recipe = recipe_of(write(tmp_path / "a.jsonl", range(10)))
    text = snippet(tmp_path / "to", {"train": [Group("train", [0], 1.0)]}, recipe)
    given = TEXT % (tmp_path / "a.jsonl", "{eval: 0.2}", "{data: split, task: custom, metric: anls}")
    whole = yaml.safe_load(given)
    for section, keys in yaml.safe_load(text).items():
        whole[section].update(keys)
    used = parse_recipe(yaml.safe_dump(whole))
    assert used.data.train[0].part is None and used.evaluate.data == recipe.evaluate.data


SEVERAL = """
model: {path: examples/tiny}
output: runs/x
data: {train: [%s], split: %s}
evaluate: {data: split}
"""


def several(folder, *given, split="{eval: 0.3}"):
    """A recipe of several sources: rows of each, and what else is said of it."""
    sources = []
    for number, (rows, more) in enumerate(given):
        file = folder / f"{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        row_format = "messages" if "messages" in rows[0] else "vqa"
        sources.append(f"{{path: {file}, format: {row_format}{more}}}")
    return parse_recipe(SEVERAL % (", ".join(sources), split))


def rows_of(names, question="Q", **more):
    return [{"image": f"{name}.png", "question": question, "answers": "a", **more} for name in names]


@pytest.mark.parametrize("split", ["{eval: 0.3}", "{eval: 0.3, by: doc}"])
def test_a_document_of_several_sources_is_in_one_part(tmp_path, split):
    first = [row for name in range(60) for row in rows_of([name], doc=f"d{name}")]
    second = [row for name in range(30, 90) for row in rows_of([name], "R", doc=f"d{name}")]
    recipe = several(tmp_path, (first, ", weight: 0.5"), (second, ""), split=split)
    train, evals = parts(recipe)
    assert train.weights == [0.5, 1.0] and evals.weights == [1.0, 1.0]
    assert len(train) + len(evals) == 120 and not documents(train) & documents(evals)
    assert all(len(part) for samples in (train, evals) for part in samples.ranges)


def test_what_is_joined_in_one_source_alone_is_told(tmp_path, tiny_processor):
    """A source is cut by itself: an image that another one shows may be in both parts, and that is said."""
    for number in range(80):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "b"}]
    pairs = [{"images": [f"{n}.png", f"{n + 40}.png"], "messages": turns} for n in range(40)]
    recipe = several(tmp_path, (pairs, ""), (rows_of(range(40, 80)), ""))
    data = read_checked(recipe, tiny_processor, show_progress=False)
    shared = {name: set() for name in data}
    for name, (samples, _) in data.items():
        for sample in samples:
            content = sample.messages[0]["content"]
            shared[name] |= {part["image"] for part in content if part["type"] == "image"}
    assert shared["train"] & shared["eval"]
    lines = look_for_overlap(recipe, data)
    assert any("an image that is trained on" in line for line in lines)


def test_a_source_of_one_document_is_named(tmp_path):
    recipe = several(tmp_path, (rows_of(range(40)), ""), (rows_of([1] * 9), ""))
    with pytest.raises(DataError, match=r"1.jsonl: none of the 1 documents in its 9 rows falls into the part to"):
        parts(recipe)


def test_a_row_that_is_bad_stays_in_its_part_when_it_is_mended(tmp_path):
    rows = rows_of(range(50)) * 2
    spoilt = [{**row, "answers": None} if number % 7 == 3 else row for number, row in enumerate(rows)]
    seen = []
    for given in (rows, spoilt):
        samples = parts(several(tmp_path, (given, "")))
        seen.append([[one.origin.row for one in part.scan(0, len(part))] for part in samples])
    assert seen[0] == seen[1]
    # One that cannot be read at all has no image to go by, and moves no other.
    lines = (tmp_path / "0.jsonl").read_text().splitlines()
    (tmp_path / "0.jsonl").write_text("\n".join([*lines[:5], "{", *lines[6:]]) + "\n")
    samples = parts(several_again(tmp_path))
    after = [{one.origin.row for one in part.scan(0, len(part))} - {6} for part in samples]
    assert after == [set(part) - {6} for part in seen[0]]


def several_again(folder):
    source = f"{{path: {folder / '0.jsonl'}, format: vqa}}"
    return parse_recipe(SEVERAL % (source, "{eval: 0.3}"))


@pytest.mark.parametrize("split", ["{eval: 0.4}", "{eval: 0.4, by: doc}"])
def test_prepared_parts_are_the_parts(tmp_path, monkeypatch, split):
    """Cut before they are copied, with the weights of their sources."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number in range(20):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [row for name in range(20) for row in rows_of([name], f"Q{name}", doc=f"d{name // 2}")]
    recipe = several(tmp_path, (rows, ", weight: 0.5"), (rows[:14], ""), split=split)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(TINY)})})
    said = []
    prepare(recipe, tmp_path / "to", say=collect(said))
    start = next(number for number, line in enumerate(said) if line.startswith("to use it"))
    changes = yaml.safe_load("\n".join(said[start + 1 :]))
    whole = yaml.safe_load(recipe.to_yaml())
    for section, keys in changes.items():
        whole[section] = (whole[section] or {}) | keys
    used = parse_recipe(yaml.safe_dump(whole))
    for before, after in zip(parts(recipe), parts(used), strict=True):
        assert [str(sample.origin) for sample in before] == [str(sample.origin) for sample in after]
    assert parts(used)[0].weights == [0.5, 1.0]

"""Prepared data: training from it is training from the originals; resumed, refused and left out as told."""

import base64
import io
import json

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from encoded_images import encode, noise
from PIL import Image
from recipes_for_tests import IMAGES, TINY, finetune, write_recipe, write_rows

import finetune.data.prepare as preparing
from finetune.data.checks.checking import check_samples
from finetune.data.prepare import prepare
from finetune.data.reading import read_checked
from finetune.data.sample import DataError
from finetune.data.samples import Samples
from finetune.errors import Interrupted, UserError
from finetune.evaluation.task_evaluation import TaskEvaluation
from finetune.files.disk_space import NotEnoughDiskSpace
from finetune.recipe import Recipe, load_recipe
from finetune.run.folder import RunFolder
from finetune.terminal import labelled
from finetune.training.train import train
from qwenvl import QwenVLProcessor
from qwenvl.images.images import ImageAccess, load_image
from qwenvl.text.chat import render_chat


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(preparing, "SHARD_ROWS", 4)


def silent(*line):
    pass


def noting(said: list[str]):
    """A `say` that collects the lines."""
    return lambda label, text="": said.append(labelled(label, text))


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def mixed_sources(folder, weights):
    """Sources of several formats: flags, unnumbered pictures, boxes, a photograph that EXIF turns, a data URI."""
    (folder / "a.png").write_bytes(IMAGES[0].read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(np.random.default_rng(0), 3, width=60, height=40)
    (folder / "b.jpg").write_bytes(encode(pixels, "JPEG", exif=exif))
    uri = "data:image/png;base64," + base64.b64encode(encode(pixels[:7, :5])).decode()
    user = {
        "role": "user",
        "content": [{"type": "image", "numbered": False}, {"type": "text", "text": "<ref>a</ref>", "grounding": True}],
    }
    boxed = {"role": "assistant", "content": "<box>(1,2),(3,4)</box>", "grounding": True}
    texts = [{"role": "system", "content": "Be short."}, {"role": "user", "content": ""}]
    texts += [{"role": "assistant", "content": "Not so.", "train": False}, {"role": "user", "content": "Again."}]
    texts += [{"role": "assistant", "content": [{"type": "text", "text": "A", "grounding": False}]}]
    turns = [
        {"from": "user", "value": "Picture 1: <img>b.jpg</img>\n<ref>it</ref>"},
        {"from": "assistant", "value": "<box>(5,6),(7,8)</box>"},
    ]
    found = {"image": "b.jpg", "phrase": ["x", "y"], "box": [4, 5, 20, 30]}
    rows = {
        "messages": [{"messages": [user, boxed], "images": [uri]}, {"messages": texts}],
        "qwen_json": [{"conversations": turns}],
        "grounding": [found, {**found, "box": [0, 0, 9, 9]}],
        "caption": [{"image": "a.png", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": "three"}],
    }
    sources = []
    for (row_format, given), weight in zip(rows.items(), weights, strict=True):
        source = {"path": write_lines(folder / f"{row_format}.jsonl", given), "format": row_format, "weight": weight}
        sources.append(source | ({"box_form": "xyxy"} if row_format == "grounding" else {}))
    return sources


def recipe_from(file, said: list[str], output) -> Recipe:
    """The recipe of a file with what `prepare` said to put into it."""
    snippet = yaml.safe_load(
        "\n".join(said[said.index("to use it   put this into the recipe, in place of what is there:") + 1 :])
    )
    changes = {f"{section}.{key}": value for section, keys in snippet.items() for key, value in keys.items()}
    return load_recipe(file, [f"output={output}", *(f"{key}={json.dumps(value)}" for key, value in changes.items())])


def read(recipe: Recipe, tokenizer):
    """(samples, what is kept in its order of use, as ids, labels and pixels) of the training data."""
    access = ImageAccess(root=recipe.data.images_root)
    samples = Samples(recipe.data.train, images_root=recipe.data.images_root, access=access)
    checked = check_samples(samples, tokenizer, max_length=2048, n_queries=4, show_progress=False)
    used = []
    for index in checked.weighted_indices(recipe.seed):
        rendered = render_chat(samples[index].messages, tokenizer, n_queries=4)
        pixels = [np.asarray(load_image(image, access=samples[index].access)).tolist() for image in rendered.images]
        used.append((rendered.ids, rendered.labels, pixels, samples[index].origin))
    return samples, used


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (2.0, 1.0, 1.5, 0.4)])
def test_samples_are_the_same(tmp_path, tiny_processor, small_shards, weights):
    recipe = load_recipe(
        write_recipe(tmp_path, data__train=mixed_sources(tmp_path, weights), data__images_root=str(tmp_path))
    )
    said = []
    manifest = prepare(recipe, tmp_path / "prepared", say=noting(said))
    assert manifest.complete
    _, wanted = read(recipe, tiny_processor.tokenizer)
    prepared = recipe_from(tmp_path / "recipe.yaml", said, tmp_path / "other")
    samples, used = read(prepared, tiny_processor.tokenizer)
    assert used == wanted
    assert len(prepared.data.train) == (1 if set(weights) == {1.0} else 4)
    assert len(samples) == 10
    parts = sorted((tmp_path / "prepared" / "train").rglob("*.parquet"))
    assert len(parts) == (3 if set(weights) == {1.0} else 4)
    table = pq.read_table(parts[-1])
    assert table.column_names == ["messages", "images", "origin"]
    # The encoded bytes are the file's own.
    stored = {image["bytes"] for row in table.to_pylist() for image in row["images"]}
    assert stored == {(tmp_path / "a.png").read_bytes(), (tmp_path / "b.jpg").read_bytes()}


def test_training_from_it_is_training_from_the_originals(tmp_path, small_shards):
    evaluation = {"data": {"path": str(tmp_path / "eval.jsonl"), "format": "messages"}, "predictions": 0}
    file = write_recipe(tmp_path, evaluate=evaluation, train__max_steps=3, train__save_steps=100)
    write_rows(tmp_path / "more.jsonl", 5, first=30)
    sources = [{"path": str(tmp_path / name), "format": "messages"} for name in ("train.jsonl", "more.jsonl")]
    recipe = load_recipe(file, [f"data.train={json.dumps([sources[0], {**sources[1], 'weight': 1.4}])}"])
    said = []
    prepare(recipe, tmp_path / "prepared", say=noting(said))
    runs = [
        RunFolder(train(wanted, silent))
        for wanted in (recipe, recipe_from(tmp_path / "recipe.yaml", said, tmp_path / "prepared_run"))
    ]
    names = ("step", "loss", "grad_norm", "eval_loss", "supervised_tokens", "eval_samples")
    first, second = ([{k: r[k] for k in names if k in r} for r in run.read_metrics()] for run in runs)
    assert first == second
    assert sum("loss" in record for record in first) == 3 and any("eval_loss" in record for record in first)
    first, second = ((run.adapter / "adapter_model.safetensors").read_bytes() for run in runs)
    assert first == second


def test_rows_are_told_by_their_first_place(tmp_path, tiny_processor):
    recipe = load_recipe(write_recipe(tmp_path))
    said = []
    prepare(recipe, tmp_path / "prepared", say=noting(said))
    samples = Samples(recipe_from(tmp_path / "recipe.yaml", said, tmp_path / "other").data.train)
    assert str(samples[9].origin) == f"{tmp_path / 'train.jsonl'}, row 10"
    with pytest.raises(DataError, match=rf"{tmp_path / 'train.jsonl'}, row 11, length"):
        check_samples(samples, tiny_processor.tokenizer, max_length=40, n_queries=4, show_progress=False)


def test_larger_images_become_copies(tmp_path, small_shards):
    pixels = noise(np.random.default_rng(1), 3, width=200, height=122)
    (tmp_path / "large.png").write_bytes(encode(pixels, "PNG"))
    (tmp_path / "large.jpg").write_bytes(encode(pixels, "JPEG"))
    (tmp_path / "small.jpg").write_bytes(encode(pixels[:120, :120], "JPEG"))
    rows = [{"image": name, "caption": "x"} for name in ("large.png", "large.jpg", "small.jpg")]
    source = {"path": write_lines(tmp_path / "captions.jsonl", rows), "format": "caption"}
    recipe = load_recipe(write_recipe(tmp_path, data__train=[source], data__images_root=str(tmp_path)))
    said = []
    prepare(recipe, tmp_path / "prepared", 120, say=noting(said))
    assert any("pixels are smaller copies" in line for line in said)
    table = pq.read_table(tmp_path / "prepared" / "train" / "00000.parquet")
    png, jpeg, same = (row["images"][0]["bytes"] for row in table.to_pylist())
    assert same == (tmp_path / "small.jpg").read_bytes()
    wanted = Image.fromarray(pixels).resize((120, 73), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(wanted))
    with Image.open(io.BytesIO(jpeg)) as image:
        assert (image.format, image.size) == ("JPEG", (120, 73))
    with pytest.raises(UserError, match="--image-size 8: the model sees images at"):
        prepare(recipe, tmp_path / "prepared", 8, say=silent)


class Killed(BaseException):
    """As SIGKILL: nothing of ours gets to run."""


def fail_at(monkeypatch, shard, error):
    """Make the writing of the n-th shard end in `error`, in the middle of it."""
    calls = []
    write = pq.ParquetWriter.write_table

    def write_table(writer, table):
        write(writer, table)
        calls.append(table)
        if len(calls) == shard:
            raise error

    monkeypatch.setattr(pq.ParquetWriter, "write_table", write_table)
    return calls


@pytest.mark.parametrize("error", [Interrupted(15, saved=False), OSError(28, "No space left on device"), Killed()])
def test_an_interrupted_prepare_goes_on(tmp_path, monkeypatch, small_shards, error):
    recipe = load_recipe(write_recipe(tmp_path))
    prepare(recipe, tmp_path / "whole", say=silent)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        fail_at(patch, 3, error)
        if isinstance(error, Killed):  # a killed process leaves its partial file
            patch.setattr("pathlib.Path.unlink", lambda *args, **kwargs: None)
        prepare(recipe, tmp_path / "prepared", say=silent)
    folder = tmp_path / "prepared" / "train"
    assert sorted(file.name for file in folder.glob("*.parquet")) == ["00000.parquet", "00001.parquet"]
    assert len(list(folder.glob(".*"))) == isinstance(error, Killed)
    # One of the files that were done is damaged meanwhile.
    data = bytearray((folder / "00001.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "00001.parquet").write_bytes(data)
    said = []
    with monkeypatch.context() as patch:
        written = fail_at(patch, 0, None)
        prepare(recipe, tmp_path / "prepared", say=noting(said))
    assert "continuing  1 of 4 files are there" in said
    assert "damaged     train/00001.parquet is missing or damaged: it is written again" in said
    assert [len(table) for table in written] == [4, 4, 2]
    names = [f"train/0000{number}.parquet" for number in range(4)]
    for name in names:
        assert (tmp_path / "prepared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    first, second = (json.loads((tmp_path / kind / "prepared.json").read_text()) for kind in ("whole", "prepared"))
    assert first == second and sorted(first["shards"]) == names
    assert list(folder.glob(".*")) == []


def test_what_is_prepared_is_not_written_again(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path))
    first, second = [], []
    prepare(recipe, tmp_path / "prepared", say=noting(first))
    fail_at(monkeypatch, 1, AssertionError("written again"))
    prepare(recipe, tmp_path / "prepared", say=noting(second))
    assert second == first


def test_other_input_is_refused_with_the_difference(tmp_path):
    file = write_recipe(tmp_path)
    prepare(load_recipe(file), tmp_path / "prepared", say=silent)
    before = (tmp_path / "prepared" / "prepared.json").read_bytes()
    with pytest.raises(UserError, match=r"prepared from something else:\n  image_size: null -> 200\nGive another"):
        prepare(load_recipe(file), tmp_path / "prepared", 200, say=silent)
    with pytest.raises(UserError, match=r"data.max_length: 2048 -> 1000"):
        prepare(load_recipe(file, ["data.max_length=1000"]), tmp_path / "prepared", say=silent)
    write_rows(tmp_path / "train.jsonl", 13)
    with pytest.raises(UserError, match=r"fingerprints.train: "):
        prepare(load_recipe(file), tmp_path / "prepared", say=silent)
    assert (tmp_path / "prepared" / "prepared.json").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"not prepared data and not empty \(thesis.txt\)"):
        prepare(load_recipe(file), tmp_path / "full", say=silent)


def test_a_folder_that_cannot_be_written(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=rf"cannot .* {tmp_path / 'file'}: .*file"):
        prepare(recipe, tmp_path / "file", say=silent)
    with pytest.raises(UserError, match=r"cannot .*file"):
        prepare(recipe, tmp_path / "file" / "below", say=silent)


def test_a_damaged_manifest_is_refused(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path))
    prepare(recipe, tmp_path / "prepared", say=silent)
    for text in ("{", "[1]", "{}", '{"made_from": {}, "counts": {}, "other": 1}', "\xff"):
        (tmp_path / "prepared" / "prepared.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"prepared.json is damaged .*: remove .* to prepare the data again"):
            prepare(recipe, tmp_path / "prepared", say=silent)


def with_bad_images(folder):
    """A source of 12 rows; the JPEG of the 6th is cut off, the PNG of the 11th is HTML."""
    pixels = noise(np.random.default_rng(2), 3, width=40, height=40)
    rows = []
    for number in range(12):
        name, data = (f"{number}.jpg", encode(pixels, "JPEG")) if number % 2 else (f"{number}.png", encode(pixels))
        data = {5: data[: len(data) // 2], 10: b"<html>404"}.get(number, data)
        (folder / name).write_bytes(data)
        rows.append({"image": name, "caption": f"number {number}"})
    return {"path": write_lines(folder / "captions.jsonl", rows), "format": "caption"}


def test_bad_images_are_found(tmp_path, small_shards):
    file = write_recipe(tmp_path, data__train=[with_bad_images(tmp_path)], data__images_root=str(tmp_path))
    recipe = load_recipe(file)
    with pytest.raises(DataError) as caught:
        prepare(recipe, tmp_path / "prepared", say=silent)
    text = str(caught.value)
    assert "of 12 samples, 2 have images that cannot be read (fix them, or leave them out with on_bad_row" in text
    assert f"{tmp_path / 'captions.jsonl'}, row 6, images[0]: 5.jpg: its JPEG data cannot be decoded" in text
    assert f"{tmp_path / 'captions.jsonl'}, row 11, images[0]: 10.png: its content is not an image" in text
    folder = tmp_path / "prepared" / "train"
    assert [path.name for path in folder.iterdir()] == ["00000.parquet"]
    # Mended, only what was missing is written.
    before = (folder / "00000.parquet").stat().st_mtime_ns
    (tmp_path / "5.jpg").write_bytes((tmp_path / "3.jpg").read_bytes())
    (tmp_path / "10.png").write_bytes((tmp_path / "0.png").read_bytes())
    manifest = prepare(recipe, tmp_path / "prepared", say=silent)
    assert [shard["rows"] for shard in manifest.shards.values()] == [4, 4, 4]
    assert (folder / "00000.parquet").stat().st_mtime_ns == before
    # Of what is complete, other images are something else.
    (tmp_path / "10.png").write_bytes((tmp_path / "3.jpg").read_bytes())
    with pytest.raises(UserError, match=r"\n  images.train: "):
        prepare(recipe, tmp_path / "prepared", say=silent)


def test_bad_images_are_left_out_and_listed(tmp_path, small_shards, tiny_processor):
    file = write_recipe(tmp_path, data__train=[with_bad_images(tmp_path)], data__images_root=str(tmp_path))
    recipe, said = load_recipe(file, ["data.on_bad_row=skip"]), []
    manifest = prepare(recipe, tmp_path / "prepared", say=noting(said))
    assert [shard["rows"] for shard in manifest.shards.values()] == [4, 3, 3]
    assert (
        f"left out    2 rows with images that cannot be read; {tmp_path / 'prepared' / 'left_out.jsonl'} lists them"
        in said
    )
    lines = [json.loads(line) for line in (tmp_path / "prepared" / "left_out.jsonl").read_text().splitlines()]
    assert [line["origin"] for line in lines] == [f"{tmp_path / 'captions.jsonl'}, row {row}" for row in (6, 11)]
    _, used = read(recipe_from(tmp_path / "recipe.yaml", said, tmp_path / "other"), tiny_processor.tokenizer)
    assert [origin.row for *_, origin in used] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 12]


def test_room_on_the_disk_is_asked_for_first(tmp_path, monkeypatch):
    asked = []

    def check(folder, needed, what):
        asked.append(needed)
        raise NotEnoughDiskSpace("too little")

    monkeypatch.setattr(preparing, "check_disk_space", check)
    recipe = load_recipe(write_recipe(tmp_path))
    with pytest.raises(NotEnoughDiskSpace):
        prepare(recipe, tmp_path / "prepared", say=silent)
    assert list((tmp_path / "prepared").rglob("*.parquet")) == []
    size = sum(IMAGES[(row + n) % len(IMAGES)].stat().st_size for row in range(14) for n in range(row % 3))
    assert size < asked[0] < 1.5 * size + 5000


def test_data_of_a_task_stays_where_its_columns_are(tmp_path):
    """A score needs all answers of a question; a conversation has one."""
    (tmp_path / "a.png").write_bytes(IMAGES[0].read_bytes())
    rows = [{"image": str(tmp_path / "a.png"), "question": "Total?", "answers": ["x", "y"]}]
    asked = {"path": write_lines(tmp_path / "asked.jsonl", rows), "format": "vqa"}
    for data, stays in ((asked, True), ({"path": str(tmp_path / "eval.jsonl"), "format": "messages"}, False)):
        folder = tmp_path / f"stays-{stays}"
        evaluation = {"data": data, "predictions": 0, "task": "custom", "metric": "anls"}
        file = write_recipe(tmp_path, evaluate=evaluation, data__images_root="/")
        said = []
        prepare(load_recipe(file), folder, say=noting(said))
        assert any(line.startswith("evaluate    its data stays where it is: task custom") for line in said) is stays
        assert (folder / "eval").exists() is not stays
        used = recipe_from(file, said, tmp_path / "other").evaluate.data[0]
        assert used.path == (data["path"] if stays else str(folder / "eval"))


def test_sources_that_are_scored_keep_their_folders_and_names(tmp_path):
    """Of one folder there would be one score, and another sample of questions."""
    write_rows(tmp_path / "old.jsonl", 6, first=40)
    sources = [
        {"path": str(tmp_path / "eval.jsonl"), "format": "messages", "name": "new"},
        {"path": str(tmp_path / "old.jsonl"), "format": "messages"},
    ]
    evaluation = {"data": sources, "task": "custom", "metric": "anls", "sample": 6}
    recipe = load_recipe(write_recipe(tmp_path, evaluate=evaluation))
    said = []
    prepare(recipe, tmp_path / "prepared", say=noting(said))
    prepared = recipe_from(tmp_path / "recipe.yaml", said, tmp_path / "other")
    assert [(source.path, source.name) for source in prepared.evaluate.data] == [
        (str(tmp_path / "prepared" / "eval" / name), name) for name in ("new", "old")
    ]
    processor = QwenVLProcessor.from_pretrained(TINY)
    asked = [TaskEvaluation(each, processor).questions for each in (recipe, prepared)]
    assert str(asked[0]) == str(asked[1]) == "6 of 10 questions (new 3, old 3)"
    texts = [[(question.source, question.text, question.answers) for question in sample] for sample in asked]
    assert texts[0] == texts[1]
    # Another name is another set of folders.
    with pytest.raises(UserError, match="holds data prepared from something else"):
        prepare(load_recipe(tmp_path / "recipe.yaml", ["evaluate.data.0.name=x"]), tmp_path / "prepared", say=silent)


def test_the_command(tmp_path):
    file = write_recipe(tmp_path)
    done = finetune("prepare", file, "--to", tmp_path / "prepared", "--image-size", "0", check=False)
    assert done.returncode == 2 and "must be a number of pixels from 1, not '0'" in done.stderr
    done = finetune("prepare", file, "--to", tmp_path / "prepared")
    assert f"path: {tmp_path / 'prepared' / 'train'}" in done.stdout
    assert json.loads((tmp_path / "prepared" / "prepared.json").read_text())["complete"]


def test_markup_that_is_text_is_text_in_prepared_data_too(tmp_path, tiny_processor):
    """What is not read is not in prepared rows; what is text there is said again."""
    turns = [{"role": "user", "content": "Where is <image>?"}, {"role": "assistant", "content": "<image> is here."}]
    row = {"messages": turns, "tools": ["x"], "images": []}
    sources = [{"path": write_lines(tmp_path / "rows.jsonl", [row]), "format": "messages"}]
    file = write_recipe(tmp_path, data__train=sources, evaluate=None, data__images_root=str(tmp_path))
    overrides = ["data.markup_as_text=[<image>]", "data.ignore=[tools]"]
    said = []
    prepare(load_recipe(file, overrides), tmp_path / "prepared", say=noting(said))
    assert not any("ignore" in line for line in said)
    recipe = recipe_from(file, said, tmp_path / "other")
    assert recipe.data.markup_as_text == ("<image>",) and not recipe.data.ignore
    before, after = (
        read_checked(one, tiny_processor, show_progress=False)["train"][0][0].messages
        for one in (load_recipe(file, overrides), recipe)
    )
    assert render_chat(after, tiny_processor.tokenizer).ids == render_chat(before, tiny_processor.tokenizer).ids

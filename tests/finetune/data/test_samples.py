"""Several sources as one sequence: order, laziness, image paths, pickling, fingerprints."""

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import datasets
import pytest
import sources_for_tests

from finetune.data.sample import BadRow, DataError, Origin, Sample
from finetune.data.samples import Samples
from qwenvl.images.images import ImageAccess, load_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def source(path, row_format="vqa", **settings):
    return sources_for_tests.source(path, row_format, **settings)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(count, name="Q"):
    return [{"image": f"{i}.png", "question": f"{name}{i}", "answers": "A"} for i in range(count)]


def asked(sample):
    return sample.messages[0]["content"][1]["text"]


def test_samples_come_in_the_order_of_their_sources(tmp_path):
    several = {"image": "x.png", "question": ["R0", "R1", "R2"], "answers": ["A", "B", "C"]}
    samples = Samples(
        [
            source(write(tmp_path / "a.jsonl", questions(3))),
            source(write(tmp_path / "b.jsonl", [several, *questions(1, "S"), several]), weight=2),
            source(write(tmp_path / "c.jsonl", questions(9, "T")), limit=2, weight=None),
        ]
    )
    wanted = ["Q0", "Q1", "Q2", "R0", "R1", "R2", "S0", "R0", "R1", "R2", "T0", "T1"]
    assert [asked(sample) for sample in samples] == wanted
    assert [asked(samples[index]) for index in range(-12, 0)] == wanted
    assert samples.ranges == [range(3), range(3, 10), range(10, 12)]
    assert samples.weights == [1.0, 2.0, 1.0]
    for start in range(12):
        for stop in range(start, 13):
            assert [asked(sample) for sample in samples.scan(start, stop)] == wanted[start:stop]
    rows = [sample.origin.row for sample in samples]
    assert rows == [1, 2, 3, 1, 1, 1, 2, 3, 3, 3, 1, 2]
    assert samples[4].origin == Origin(str(tmp_path / "b.jsonl"), 1)
    assert samples[4].messages[1] == {"role": "assistant", "content": "B"}
    for index in (12, -13):
        with pytest.raises(IndexError):
            samples[index]


def test_a_bad_row_names_its_place(tmp_path):
    path = write(tmp_path / "train.jsonl", [*questions(1), {"image": 3, "question": "Q", "answers": "A"}])
    samples = Samples([source(path)])
    with pytest.raises(BadRow) as caught:
        samples[1]
    problem = caught.value
    assert str(problem) == f"{path}, row 2, image: must be a path, encoded bytes or {{bytes, path}}, not int"
    assert (problem.origin, problem.field) == (Origin(str(path), 2), "image")
    assert pickle.loads(pickle.dumps(problem)).args == problem.args
    good, bad = samples.scan(0, 2)
    assert (isinstance(good, Sample), bad.args) == (True, problem.args)


def test_a_bad_row_of_several_samples_stands_at_each_of_their_indices(tmp_path):
    bad = {"image": "x.png", "question": ["Q", " "], "answers": ["A", "B"]}
    samples = Samples([source(write(tmp_path / "a.jsonl", [*questions(1), bad, *questions(1)]))])
    assert [isinstance(sample, BadRow) for sample in samples.scan(0, 4)] == [False, True, True, False]
    assert [isinstance(sample, BadRow) for sample in samples.scan(2, 4)] == [True, False]


def test_image_paths_start_at_the_data_file(tmp_path, monkeypatch):
    write(tmp_path / "data" / "a.jsonl", [*questions(1), {"image": "/abs/b.png", "question": "Q", "answers": "A"}])
    monkeypatch.chdir(tmp_path)
    samples = Samples([source("data/a.jsonl")])
    assert samples[0].messages[0]["content"][0] == {"type": "image", "image": str(tmp_path / "data" / "0.png")}
    assert samples[1].messages[0]["content"][0]["image"] == "/abs/b.png"
    assert samples[0].access == ImageAccess(root=tmp_path / "data")
    assert str(samples[0].origin) == "data/a.jsonl, row 1"


@pytest.mark.parametrize("how", ["images_root", "access"])
def test_images_root_and_access(tmp_path, how):
    path = write(tmp_path / "data" / "a.jsonl", questions(1))
    access = ImageAccess(allow_urls=True, max_pixels=7, root=tmp_path / "pictures" if how == "access" else None)
    root = tmp_path / "pictures" if how == "images_root" else None
    sample = Samples([source(path)], images_root=root, access=access)[0]
    assert sample.messages[0]["content"][0]["image"] == str(tmp_path / "pictures" / "0.png")
    assert sample.access == ImageAccess(allow_urls=True, max_pixels=7, root=tmp_path / "pictures")


def test_grounding_reads_the_size_of_the_image(tmp_path, tiny_images):
    image = load_image(tiny_images[0])
    image.save(tmp_path / "a.jpg")
    width, height = image.size
    rows = [
        {"image": "a.jpg", "phrase": ["x", "y"], "box": [0, 0, width / 2, height / 4]},
        {"image": "gone.jpg", "phrase": "x", "box": [0, 0, 1, 1]},
    ]
    samples = Samples([source(write(tmp_path / "a.jsonl", rows), "grounding")])
    assert [sample.messages[1]["content"] for sample in samples.scan(0, 2)] == ["<box>(0,0),(500,250)</box>"] * 2
    with pytest.raises(BadRow, match=r"row 2, image: .*there is no such file"):
        samples[2]


def test_images_of_datasets_stay_as_they_are_stored(tmp_path, tiny_images):
    data = Path(tiny_images[0]).read_bytes()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "phrase": datasets.Value("string"),
            "box": datasets.List(datasets.Value("float64")),
        }
    )
    rows = [
        {"image": {"bytes": data, "path": "a.png"}, "phrase": "x", "box": [0, 0, 8, 8]},
        {"image": {"bytes": data, "path": None}, "phrase": "y", "box": [0, 0, 8, 8]},
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    samples = Samples([source(tmp_path / "a.parquet", "grounding")])
    assert samples[0].messages[0]["content"][0]["image"] == {"bytes": data, "path": "a.png"}
    assert [sample.messages[1] for sample in samples.scan(0, 2)] == [samples[0].messages[1]] * 2
    captions = Samples([source(tmp_path / "a.parquet", "caption", columns={"caption": "phrase"})])
    assert captions[1].messages[0]["content"][0]["image"] == {"bytes": data, "path": None}
    assert [sample.messages[1]["content"] for sample in captions.scan(0, 2)] == ["x", "y"]


def test_samples_pickle_small(tmp_path):
    samples = Samples([source(write(tmp_path / "a.jsonl", questions(1000)))])
    data = pickle.dumps(samples)
    assert len(data) < 20_000
    assert list(pickle.loads(data)) == list(samples)


def read_one(samples, index):
    return asked(samples[index])


def test_samples_are_read_by_other_processes(tmp_path):
    samples = Samples([source(write(tmp_path / "a.jsonl", questions(50)))])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(read_one, [(samples, index) for index in range(50)]) == [f"Q{i}" for i in range(50)]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"row_format": "csv"}, "a.jsonl: format must be one of"),
        ({"columns": {"query": "x"}}, "a.jsonl: columns of format vqa are"),
        ({"prompt": "x"}, "a.jsonl: the prompt of format vqa must hold {question}"),
        ({"limit": 0}, "a.jsonl: limit is below 1"),
    ],
)
def test_wrong_settings_name_the_source(tmp_path, settings, reason):
    with pytest.raises(DataError) as caught:
        Samples([source(write(tmp_path / "a.jsonl", questions(1)), **settings)])
    assert reason in str(caught.value)


def test_a_source_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl: holds no rows"):
        Samples([source(write(tmp_path / "a.jsonl", []))])


def test_fingerprint_changes_with_what_the_samples_are(tmp_path):
    path = write(tmp_path / "a.jsonl", questions(3))

    def fingerprint(**settings):
        return Samples([source(path, **settings)]).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    others = [
        fingerprint(limit=2),
        fingerprint(prompt="{question} Answer:"),
        fingerprint(columns={"question": "answers", "answers": "question"}),
        fingerprint(row_format="caption", columns={"caption": "question"}),
        Samples([source(path), source(path)]).fingerprint(),
    ]
    write(path, questions(3, "R"))
    others.append(fingerprint())
    assert len({first, *others}) == 7


def test_fingerprint_sees_other_images(tmp_path):
    path = write(tmp_path / "a.jsonl", questions(3))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(bytes(100 + number))
    first = Samples([source(path)]).fingerprint()
    os.utime(tmp_path / "1.png", (1, 1))  # as a copy has it
    assert Samples([source(path)]).fingerprint() == first
    (tmp_path / "1.png").write_bytes(bytes(90))
    second = Samples([source(path)]).fingerprint()
    (tmp_path / "2.png").unlink()
    third = Samples([source(path)]).fingerprint()
    assert len({first, second, third}) == 3
    assert Samples([source(path)]).fingerprint(images=False) == Samples([source(path)]).fingerprint(images=False)


def test_fingerprint_looks_at_a_bounded_number_of_images(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("finetune.data.samples.file_size", lambda path: looked.append(path) or 7)
    Samples([source(write(tmp_path / "a.jsonl", questions(5000)))]).fingerprint()
    assert 1000 <= len(looked) == len(set(looked)) <= 2000
    assert str(tmp_path / "0.png") in looked

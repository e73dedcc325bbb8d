"""Images that cannot be decoded, met while a run works: left out, counted and listed, or refused before anything."""

import io
import json
import os
import shutil
import signal
import tarfile

import datasets
import pytest
from recipes_for_tests import IMAGES, finetune, write_recipe
from said import collect

from finetune.errors import Interrupted, UserError
from finetune.recipe import load_recipe
from finetune.training.interrupts import StopOnSignal
from finetune.training.train import train

BAD = 4
"""The row whose image is cut off, of six."""


def write_data(folder, name="train", rows=6, bad=BAD, part="training"):
    """Rows with an image each, of which one is cut off in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):
        image = folder / f"{name}{number}.png"
        content = IMAGES[number % len(IMAGES)].read_bytes()
        image.write_bytes(content[: len(content) // 2] if number == bad else content)
        turns = [
            {"role": "user", "content": f"Question {number} of {part}"},
            {"role": "assistant", "content": "Yes. " * (number % 3 + 1)},
        ]
        lines.append(json.dumps({"messages": turns, "images": [image.name]}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / f"{name}.jsonl"


SETTINGS = {
    "adapter__dropout": 0.0,
    "data__images_root": None,
    "data__check_images": "headers",
    "train__max_steps": 4,
    "train__gradient_accumulation_steps": 2,
    "train__save_steps": 1,
}


def make(folder, on_bad_row="skip", bad=BAD, **changes):
    file = write_recipe(folder, **{**SETTINGS, "data__on_bad_row": on_bad_row, **changes})
    write_data(folder, bad=bad)
    return file


def run(file, *overrides):
    said = []
    return train(load_recipe(file, overrides), say=collect(said)), said


def adapter_of(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def lines_of(folder, name="left_out.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def losses_of(folder):
    return [record["loss"] for record in lines_of(folder, "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The finished run that leaves the row out, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    return run(make(folder))


def test_the_row_is_left_out_counted_and_listed(whole):
    folder, said = whole
    (line,) = lines_of(folder)
    assert line["data"] == "train" and line["sample"] == BAD and line["origin"].endswith("train.jsonl, row 5")
    assert "train4.png" in line["reason"]
    assert any(text.startswith("left out") and str(folder / "left_out.jsonl") in text for text in said)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["left_out"] == {"train": 1} and facts["rows"]["train"]["kept"] == 6
    report = (folder / "report.html").read_text()
    assert "1 of train whose images or rows could not be read later" in report and "left_out.jsonl" in report
    assert len(losses_of(folder)) == 4


def stop_at(step, patch):
    """A signal after this step."""
    step_end = StopOnSignal.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == step:
            self.received = signal.SIGTERM
        return step_end(self, args, state, control, **kwargs)

    patch.setattr(StopOnSignal, "on_step_end", stop)


def stopped(file, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted):
            run(file)


def delete_the_row(folder):
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:BAD] + lines[BAD + 1 :]))


@pytest.mark.parametrize("change", [pytest.param(None, marks=pytest.mark.slow), delete_the_row])
def test_a_run_goes_on_bit_for_bit_after_its_bad_row_was_left_or_taken_out(whole, tmp_path, monkeypatch, change):
    file = make(tmp_path)
    stopped(file, monkeypatch, 2)
    if change is not None:
        change(tmp_path)
    folder, said = run(file)
    assert adapter_of(folder) == adapter_of(whole[0])
    gone = "1 row of the train data gone or unusable since the run began: its place stays empty"
    assert any(gone in text for text in said) == (change is not None)


def test_a_refused_run_goes_on_bit_for_bit_after_its_bad_row_was_mended(tmp_path):
    """As if the image had been good from the start."""
    good, _ = run(make(tmp_path / "good", "error", bad=None, data__shuffle=False))
    file = make(tmp_path / "own", "error", data__shuffle=False)
    with pytest.raises(UserError, match=r"train4.png.*Mend it or take the row out, and start the same run again"):
        run(file)
    assert lines_of(tmp_path / "own" / "run")[0]["sample"] == BAD
    shutil.copy(tmp_path / "good" / "train4.png", tmp_path / "own" / "train4.png")
    folder, said = run(file)
    assert adapter_of(folder) == adapter_of(good)
    (line,) = lines_of(folder)
    assert any(text.endswith("from step 2") for text in said)
    assert line["mended"] and json.loads((folder / "run.json").read_text())["left_out"] == {}
    assert not any(text.startswith("left out") for text in said)


def test_a_step_without_a_single_image_left_has_no_loss(tmp_path):
    """One row a step, and one of the three rows is bad: its step changes nothing that is learned."""
    file = make(tmp_path, train__gradient_accumulation_steps=1, train__max_steps=3, data__shuffle=False)
    write_data(tmp_path, rows=3, bad=1)
    folder, _ = run(file)
    records = [record for record in lines_of(folder, "metrics.jsonl") if "learning_rate" in record]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert ["loss" in record for record in records] == [True, False, True]
    assert records[1]["grad_norm"] == 0


@pytest.mark.slow
def test_a_cache_of_features_leaves_the_row_out_too(whole, tmp_path):
    file = make(tmp_path, data__vision_cache="memory")
    folder, said = run(file)
    assert [line["sample"] for line in lines_of(folder)] == [BAD]
    assert any("1 images cannot be read: their samples are left out" in text for text in said)
    assert losses_of(folder) == pytest.approx(losses_of(whole[0]), abs=1e-4)


def test_a_cache_of_features_refuses_it(tmp_path):
    refusing = make(tmp_path / "refusing", "error", data__vision_cache="memory")
    with pytest.raises(UserError, match=r"1 images cannot be encoded:\n.*train4.png"):
        run(refusing)


def questions(folder, on_bad_row, bad):
    """The rows to evaluate on, one of them cut off, as questions of a task and for the loss."""
    evaluate = {"data": str(folder / "eval.jsonl"), "task": "custom", "metric": "anls", "predictions": 4}
    evaluate["data"] = {"path": str(folder / "eval.jsonl"), "format": "messages"}
    steps = {"train__eval_strategy": "steps", "train__eval_steps": 1, "train__max_steps": 1}
    file = make(folder, on_bad_row, bad=None, evaluate={**evaluate, "max_new_tokens": 2}, **steps)
    write_data(folder, "eval", rows=3, bad=bad, part="evaluation")
    return file


def test_questions_and_losses_of_an_evaluation_are_left_out(tmp_path):
    folder, said = run(questions(tmp_path, "skip", 1))
    found = {(line["data"], line["sample"]) for line in lines_of(folder)}
    assert found == {("eval", 1), ("questions", 1)}
    (record,) = [one for one in lines_of(folder, "metrics.jsonl") if "eval_loss" in one]
    assert record["eval_samples"] == 2
    facts = json.loads((folder / "run.json").read_text())
    assert facts["score"]["questions"] == 2 and facts["left_out"] == {"eval": 1, "questions": 1}
    shown = {line["origin"].rpartition(" ")[2] for line in lines_of(folder, "predictions.jsonl")}
    assert shown == {"1", "3"}
    assert any(text.startswith("left out") and "1 of eval" in text and "1 of questions" in text for text in said)


def test_an_evaluation_refuses_them_where_bad_rows_are_errors(tmp_path):
    with pytest.raises(
        UserError, match=r"evaluate.data: 1 of the sampled questions are on damaged images:\n.*eval1.png"
    ):
        run(questions(tmp_path, "error", 1))


def test_nothing_left_to_evaluate_on_is_said(tmp_path):
    file = questions(tmp_path, "skip", 0)
    write_data(tmp_path, "eval", rows=1, bad=0)
    with pytest.raises(UserError, match=r"on damaged images|can be read now"):
        run(file)


def write_inside(folder, kind, kept=range(6)):
    """The rows of `write_data` with their images inside a Parquet file, a saved dataset or a tar."""
    contents = {number: (folder / f"train{number}.png").read_bytes() for number in kept}
    turns = {
        number: {"prompt": f"Question {number}", "completion": "Yes. " * (number % 3 + 1), "tag": f"r{number}"}
        for number in kept
    }
    if kind == "tar":
        with tarfile.open(folder / "rows.tar", "w") as made:
            for number in kept:
                inside = (("png", contents[number]), ("json", json.dumps(turns[number]).encode()))
                for ending, content in inside:
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    made.addfile(member, io.BytesIO(content))
        return folder / "rows.tar", {"images": "image"}
    columns = {name: [turns[number][name] for number in kept] for name in ("prompt", "completion", "tag")}
    columns["images"] = [[{"bytes": content, "path": None}] for content in contents.values()]
    made = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    if kind == "parquet":
        made.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet", {}
    shutil.rmtree(folder / "rows", ignore_errors=True)
    made.save_to_disk(folder / "rows")
    return folder / "rows", {}


@pytest.mark.parametrize(
    "kind", ["parquet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("saved", "tar"))]
)
def test_images_inside_the_data_are_left_out_and_their_row_may_go(tmp_path, monkeypatch, kind):
    """As with images in files: met, noted, and the run goes on after the row was taken out."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    file = make(tmp_path, data__shuffle=False)
    path, columns = write_inside(tmp_path, kind)
    source = json.dumps({"path": str(path), "format": "messages", "columns": columns})
    said = []
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Interrupted):
            train(load_recipe(file, [f"data.train={source}", "train.max_steps=5"]), say=collect(said))
    (line,) = lines_of(tmp_path / "run")
    assert line["sample"] == BAD and "row 5" in line["origin"] and "cannot be decoded" in line["reason"]
    assert losses_of(tmp_path / "run")[2:]
    write_inside(tmp_path, kind, [number for number in range(6) if number != BAD])
    folder, said = run(file, f"data.train={source}", "train.max_steps=5")
    assert any("1 row of the train data gone or unusable since the run began" in text for text in said)
    assert len(losses_of(folder)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["off", "memory"])
def test_two_processes_leave_out_what_one_does(tmp_path, cache):
    settings = {"data__shuffle": False, "data__vision_cache": cache}
    one, _ = run(make(tmp_path / "one", **settings))
    two = make(tmp_path / "two", **settings, train__gradient_accumulation_steps=1)
    port = str(20000 + os.getpid() % 20000)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    done = finetune(two, env={**os.environ, "OMP_NUM_THREADS": "1"}, launcher=launcher)
    folders = one, tmp_path / "two" / "run"
    losses = [losses_of(folder) for folder in folders]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 4
    for folder in folders:
        assert [(line["data"], line["sample"]) for line in lines_of(folder)] == [("train", BAD)]
        assert json.loads((folder / "run.json").read_text())["left_out"] == {"train": 1}
    assert done.stdout.count("left out  ") == 1

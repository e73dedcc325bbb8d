"""What files, columns and file names say reaches the terminal only with its control characters made visible."""

import csv
import json
import shutil

import pytest
from recipes_for_tests import IMAGES, TINY, finetune, write_recipe

TITLE = "\x1b]0;title\x07"  # sets the title of a terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, images, rows and recipes, with the title in their names and contents."""
    folder = tmp_path_factory.mktemp("hostile") / TITLE
    folder.mkdir()
    shutil.copytree(TINY, folder / f"tiny{TITLE}")
    shutil.copy(IMAGES[0], folder / f"image{TITLE}.png")
    (folder / f"damaged{TITLE}.png").write_text(TITLE)
    for name, image in (("rows", "image"), ("bad", "damaged"), ("missing", "none")):
        turns = [{"role": "user", "content": f"Q {TITLE}"}, {"role": "assistant", "content": f"A {TITLE}"}]
        row = {"messages": turns, "images": [f"{image}{TITLE}.png"]}
        (folder / f"{name}{TITLE}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    with (folder / f"answers{TITLE}.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow([f"image{TITLE}", f"question{TITLE}", f"answers{TITLE}"])
        rows.writerows([[f"image{TITLE}.png", f"Q {TITLE}", f"A {TITLE}"]] * 2)
    for name, rows, model in (
        ("recipe", "rows", "tiny"),
        ("bad", "bad", "tiny"),
        ("missing", "missing", "tiny"),
        ("no rows", "none", "tiny"),
        ("no model", "rows", "none"),
    ):
        recipe = write_recipe(
            folder,
            model__path=str(folder / f"{model}{TITLE}"),
            data__train=[{"path": str(folder / f"{rows}{TITLE}.jsonl"), "format": "messages"}],
            data__images_root=str(folder),
            evaluate={"data": [{"path": str(folder / f"rows{TITLE}.jsonl"), "format": "messages"}], "predictions": 1},
            train__max_steps=2,
            output=str(folder / f"{'run' if name == 'recipe' else name}{TITLE}"),
        )
        recipe.rename(folder / f"{name}{TITLE}.yaml")
    return folder


COLUMNS = [f"--column={role}={role}{TITLE}" for role in ("image", "question", "answers")]
EVALUATE = ["evaluate", f"run{TITLE}", "--task", "custom", "--metric", "anls", "--data", f"answers{TITLE}.csv"]
RECIPE = f"recipe{TITLE}.yaml"

# In the order of a job: each may use what those before it have written.
COMMANDS = {
    "train": (0, [RECIPE]),
    "train, finished": (0, [RECIPE]),
    "train, another run": (2, [RECIPE, "seed=9"]),
    "train, a missing image": (2, [f"missing{TITLE}.yaml"]),
    "train, a damaged image": (2, [f"bad{TITLE}.yaml", "evaluate=null"]),
    "train, no rows": (2, [f"no rows{TITLE}.yaml"]),
    "train, no model": (2, [f"no model{TITLE}.yaml"]),
    "train, no recipe": (2, [f"none{TITLE}.yaml"]),
    "train, an unknown key": (2, [RECIPE, f"train.{TITLE}=3"]),
    "check": (0, ["check", RECIPE, "--images", "--html", f"page{TITLE}.html"]),
    "check, a damaged image": (2, ["check", f"bad{TITLE}.yaml", "--images"]),
    "prepare": (0, ["prepare", RECIPE, "--to", f"prepared{TITLE}"]),
    "prepare, other data": (2, ["prepare", RECIPE, "data.max_length=99", "--to", f"prepared{TITLE}"]),
    "evaluate": (0, [*EVALUATE, *COLUMNS, "--max-new-tokens", "3", "--compare", f"tiny{TITLE}", "--out", TITLE]),
    "evaluate, another": (2, [*EVALUATE, *COLUMNS, "--max-new-tokens", "4", "--out", TITLE]),
    "evaluate, no column": (2, [*EVALUATE, f"--column=answers={TITLE}"]),
    "merge": (0, ["merge", f"run{TITLE}", "--to", f"merged{TITLE}"]),
    "merge, again": (0, ["merge", f"run{TITLE}", "--to", f"merged{TITLE}"]),
    "merge, no run": (2, ["merge", f"none{TITLE}", "--to", "other"]),
    "export": (0, ["export", f"merged{TITLE}", "--to", "qwen2", "--out", f"exported{TITLE}"]),
    "export, there already": (2, ["export", f"merged{TITLE}", "--to", "nf4", "--out", f"exported{TITLE}"]),
    "export, no model": (2, ["export", f"none{TITLE}", "--to", "nf4"]),
    "chat": (0, ["chat", f"run{TITLE}", "--image", f"image{TITLE}.png", "--once", TITLE, "--max-new-tokens", "3"]),
    "chat, a damaged image": (2, ["chat", f"run{TITLE}", "--image", f"damaged{TITLE}.png", "--once", TITLE]),
}


def test_nothing_controls_the_terminal(folder):
    for name, (code, words) in COMMANDS.items():
        assert_nothing_controls_it(folder, name, code, words)


@pytest.mark.slow
def test_nothing_of_bench_controls_the_terminal(folder):
    words = ["bench", RECIPE, "--lengths", "384", "--steps", "1", "--profiles", "ours", "--to", f"bench{TITLE}"]
    assert_nothing_controls_it(folder, "bench", 0, words)


def assert_nothing_controls_it(folder, name, code, words):
    done = finetune(*words, check=False, cwd=folder)
    # What a model replies goes into a pipe as it is, for the program that reads it.
    said = done.stderr if name == "chat" else done.stdout + done.stderr
    assert done.returncode == code, (name, said)
    assert [line for line in said.split("\n") if "\x1b" in line or "\x07" in line] == [], name

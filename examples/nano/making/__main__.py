"""Make the bundled nano checkpoint from scratch: vocabulary, warm starts, three training stages and the card.

    python -m examples.nano.making --to runs/nano/checkpoint

Run from the repository's root, in the environment that `make test` sets up. Every phase writes its result to
runs/nano; a phase whose result exists is skipped, and one that was interrupted is resumed. It took 177 minutes on two
CPU cores without bfloat16 units, where matrix products are in float32. The stages are trained on a GPU if there is
one.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from examples.nano.making.checkpoint import at_resolution, mix, publish
from examples.nano.making.comparisons import write_comparisons
from examples.nano.making.documents.write import Plan, write
from examples.nano.making.stage import run_stage
from examples.nano.making.start import IMAGE_SIZE, LOW_IMAGE_SIZE, write_start
from examples.nano.making.texts import ASKED, ONE_PAGE, QUESTIONS, READ, TRAINED, TWO_PAGES, WITH_FIELDS, asked_texts
from examples.nano.making.vocabulary import train_vocabulary
from examples.nano.making.warm_start.processes import warm_starts
from finetune.files.atomic_writes import write_text

WORK = Path("runs/nano")
RECIPES = Path("recipes/nano")
STAGES = ("stage1_pretrain", "stage2_multitask", "stage3_sft")
VOCABULARY_DOCUMENTS = 4000
COMPARISONS = 4600  # conversations
MIXED = WORK / "stage3-mixed"
BACK = 0.3
"""After stage 3, the share of the weights that it started from (see `checkpoint.mix`)."""

DATA = {
    "stage1": Plan("train", READ, ("transcribe",), 6400, 1, LOW_IMAGE_SIZE, seed=3000),
    "stage2": Plan("train", TRAINED, ONE_PAGE, 50_000, 6, IMAGE_SIZE, seed=4000, joined=0.97),
    "stage2-reading": Plan("train", READ, ("transcribe",), 14_000, 1, IMAGE_SIZE, seed=4200),
    "stage2-pairs": Plan("train", WITH_FIELDS, TWO_PAGES, 7000, 6, IMAGE_SIZE, seed=4500, joined=0.97),
    "stage3": Plan("train", ASKED, QUESTIONS, 13_900, 5, IMAGE_SIZE, seed=5000, joined=1.0),
    "stage3-reading": Plan("train", TRAINED, ONE_PAGE, 3200, 6, IMAGE_SIZE, seed=5200, joined=0.95),
    "stage3-pairs": Plan("train", WITH_FIELDS, TWO_PAGES, 3200, 6, IMAGE_SIZE, seed=5500, joined=0.95),
}
"""What each stage is trained on: more documents than it needs, so that it sees none twice."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.nano.making",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--to", type=Path, required=True, help="folder to write the checkpoint to; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.to.exists():
        print(f"{given.to} exists; delete it, or give another folder with --to", file=sys.stderr)
        return 2
    seconds = Phases(WORK / "seconds.json")
    start, vision, language = WORK / "start", WORK / "vision.pt", WORK / "language.pt"
    seconds.time("start", start, lambda: make_start(start, given.seed))
    warm = WORK / "warm"
    seconds.time("warm starts", warm, lambda: warm_starts(start, vision, language, warm, given.seed))
    for name, plan in DATA.items():
        folder = WORK / "data" / name
        seconds.time(f"data of {name}", folder / "train", partial(make_data, plan, folder))
    compared = WORK / "data" / "stage2-comparisons.jsonl"
    seconds.time("data of stage2-comparisons", compared, lambda: write_comparisons(COMPARISONS, compared, seed=4800))
    before = done = warm
    for recipe in STAGES:
        name = recipe.partition("_")[0]
        before, done = done, finished(name)
        seconds.time(name, done, partial(make_stage, recipe, WORK / name / "model", done))
    seconds.time("stage3, mixed", MIXED, lambda: mix(before, done, BACK, MIXED))
    publish(MIXED, given.to, seconds.taken)
    print(f"{given.to}: the checkpoint. Next: python -m examples.nano.making.scores {given.to}")
    return 0


class Phases:
    """Runs phases, skipping those whose result exists, and keeps the seconds of each in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def time(self, name: str, result: Path, do: Callable[[], None]) -> None:
        """Run a phase, unless its result exists."""
        if result.exists():
            print(f"{name}: {result} is there")
            return
        print(f"{name}: begins", flush=True)
        began = time.monotonic()
        try:
            do()
        finally:  # an interrupted phase counts the time of all its attempts
            self.taken[name] = round(self.taken.get(name, 0) + time.monotonic() - began, 1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self.taken, indent=2) + "\n")
        print(f"{name}: {self.taken[name]:.0f} s", flush=True)


def finished(stage: str) -> Path:
    """The checkpoint that a stage ("stage1") leaves for the next one."""
    return WORK / f"{stage}-at-{IMAGE_SIZE}"


def make_start(folder: Path, seed: int) -> None:
    """Write the vocabulary and the initial weights."""
    vocabulary = train_vocabulary(asked_texts(VOCABULARY_DOCUMENTS))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_start(partial, vocabulary, seed)
    partial.rename(folder)


def make_data(plan: Plan, folder: Path) -> None:
    """Write a set of documents as Parquet files, on all cores."""
    write(plan, folder, "parquet", workers=os.cpu_count() or 1)


def make_stage(recipe: str, result: Path, done: Path) -> None:
    """Train a stage, and write the `result` of its run as `done`, for images of the higher resolution."""
    run_stage(RECIPES / f"{recipe}.yaml")
    at_resolution(result, IMAGE_SIZE, done)


if __name__ == "__main__":
    sys.exit(main())

"""What each phase contributes: scores after each, and after a short stage 2 with and without the phases before it.

    python -m examples.nano.making.ablation

Scores what `python -m examples.nano.making` left under runs/nano, and starts the short trainings from it. Their
results are kept under runs/nano/ablation; what exists there is not trained again.
"""

from pathlib import Path

import torch

from examples.nano.making.__main__ import MIXED, RECIPES, WORK, finished
from examples.nano.making.checkpoint import at_resolution
from examples.nano.making.scores import Scored, evaluate, group_of
from examples.nano.making.stage import DEVICE, run_stage
from examples.nano.making.start import IMAGE_SIZE
from examples.nano.making.texts import KNOWN_FAMILIES
from finetune.recipe import load_recipe
from qwenvl import load_model, load_processor

FOLDER = WORK / "ablation"
SHARE = 20
"""A short stage 2 has one step for this many of the whole one."""
DOCUMENTS = 280
KINDS = ("question", "two_turn", "transcribe", "two_images")
COLUMNS = {
    "question": "anls",
    "two turn": "anls",
    "two images, one of them asked about": "anls",
    "two images, compared": "choice",
}
TITLES = {"anls": "ANLS", "choice": "right picture"}


def main() -> None:
    start, warm, first = full_size(WORK / "start"), full_size(WORK / "warm"), finished("stage1")
    rows = []
    for name, folder in (
        ("warm starts", warm),
        ("and stage 1", first),
        ("and stage 2", finished("stage2")),
        ("and stage 3", finished("stage3")),
        ("and mixed with those of stage 2", MIXED),
        ("warm starts, stage 1, a twentieth of stage 2", short_stage2(first)),
        ("warm starts, a twentieth of stage 2", short_stage2(warm)),
        ("a twentieth of stage 2", short_stage2(start)),
    ):
        rows.append(row(name, scores_of(folder)))
        print(rows[-1], flush=True)
    heads = ["made by", *(f"{group}: {TITLES[score]}" for group, score in COLUMNS.items()), "character errors"]
    print("\n".join(["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows]))


def short_stage2(begin: Path) -> Path:
    """The checkpoint after a short stage 2, with its own learning rate schedule, that starts from `begin`."""
    path = RECIPES / "stage2_multitask.yaml"
    name = f"stage2-after-{begin.name.removesuffix(f'-at-{IMAGE_SIZE}')}"
    done = FOLDER / f"{name}-at-{IMAGE_SIZE}"
    if not done.exists():
        steps = load_recipe(path).train_arguments()["max_steps"] // SHARE
        run_stage(path, f"model.path={begin}", f"train.max_steps={steps}", f"output={FOLDER / name}")
        at_resolution(FOLDER / name / "model", IMAGE_SIZE, done)
    return done


def full_size(folder: Path) -> Path:
    """A checkpoint for images of the higher resolution."""
    done = FOLDER / f"{folder.name}-at-{IMAGE_SIZE}"
    if not done.exists():
        at_resolution(folder, IMAGE_SIZE, done)
    return done


def scores_of(folder: Path) -> list[Scored]:
    """Scores of a checkpoint on test documents."""
    model = load_model(folder, dtype=torch.float32, device_map=str(DEVICE))
    processor = load_processor(folder)
    return evaluate(model, processor, families=KNOWN_FAMILIES, kinds=KINDS, documents=DOCUMENTS, split="test", seed=0)


def row(name: str, scored: list[Scored]) -> str:
    """The table's row for a checkpoint: a mean score for each group of conversations."""
    cells = [name]
    for group, score in COLUMNS.items():
        values = [one.scores[score] for one in scored if group_of(one.conversation) == group]
        cells.append(f"{sum(values) / len(values):.3f}")
    errors, characters = (sum(one.scores.get(name, 0) for one in scored) for name in ("errors", "characters"))
    return f"| {' | '.join([*cells, f'{errors / characters:.1%}'])} |"


if __name__ == "__main__":
    main()

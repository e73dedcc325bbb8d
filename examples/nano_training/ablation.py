"""Whether each part of the making of the nano helps: scores after each, short trainings with and without them.

    python -m examples.nano_training.ablation

Needs what `python -m examples.nano_training` left under runs/nano. About a quarter of an hour on two CPU cores.
"""

from pathlib import Path

import torch

from examples.nano_training.__main__ import RECIPES, WORK
from examples.nano_training.checkpoint import at_resolution
from examples.nano_training.scores import Scored, evaluate, group_of
from examples.nano_training.stage import run_stage
from examples.nano_training.start import IMAGE_SIZE
from examples.nano_training.texts import KNOWN_FAMILIES
from qwenvl import load_model, load_processor

FOLDER = WORK / "ablation"
SHORT = 300  # steps of stage 2, by a schedule of that length
DOCUMENTS = 140
KINDS = ("question", "two_turn", "transcribe", "two_images")
COLUMNS = {
    "question": "anls",
    "two turn": "anls",
    "two images, one of them asked about": "anls",
    "two images, compared": "choice",
}


def main() -> None:
    rows = []
    for name, folder in (
        ("after the warm starts", at_full_resolution("warm")),
        ("after stage 1", WORK / f"stage1-at-{IMAGE_SIZE}"),
        ("after stage 2", WORK / f"stage2-at-{IMAGE_SIZE}"),
        ("after stage 3", WORK / f"stage3-at-{IMAGE_SIZE}"),
        (f"{SHORT} steps of stage 2 after stage 1", short_run(WORK / f"stage1-at-{IMAGE_SIZE}", "after-stage1")),
        (f"{SHORT} steps of stage 2 after the warm starts", short_run(at_full_resolution("warm"), "after-warm")),
        (f"{SHORT} steps of stage 2 from the start", short_run(WORK / "start", "from-start")),
    ):
        rows.append(row(name, scores_of(folder)))
        print(rows[-1], flush=True)
    names = {"anls": "ANLS", "choice": "right picture"}
    heads = ["", *(f"{group}: {names[column]}" for group, column in COLUMNS.items()), "transcribe: character errors"]
    print("\n".join(["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows]))


def at_full_resolution(name: str) -> Path:
    folder = FOLDER / f"{name}-at-{IMAGE_SIZE}"
    if not folder.exists():
        at_resolution(WORK / name, IMAGE_SIZE, folder)
    return folder


def short_run(begin: Path, name: str) -> Path:
    """Stage 2 cut short, from a checkpoint of one's choice; a run that is there is used."""
    run = FOLDER / name
    if not (run / "model").exists():
        run_stage(
            RECIPES / "stage2_multitask.yaml", f"model.path={begin}", f"train.max_steps={SHORT}", f"output={run}"
        )
    return run / "model"


def scores_of(folder: Path) -> list[Scored]:
    model = load_model(str(folder), dtype=torch.bfloat16)
    processor = load_processor(str(folder))
    return evaluate(model, processor, families=KNOWN_FAMILIES, kinds=KINDS, documents=DOCUMENTS, split="test", seed=0)


def row(name: str, scored: list[Scored]) -> str:
    cells = [name]
    for group, column in COLUMNS.items():
        values = [one.scores[column] for one in scored if group_of(one.conversation) == group]
        cells.append(f"{sum(values) / len(values):.3f}")
    errors, characters = (sum(one.scores.get(name, 0) for one in scored) for name in ("errors", "characters"))
    return f"| {' | '.join([*cells, f'{errors / characters:.1%}'])} |"


if __name__ == "__main__":
    main()

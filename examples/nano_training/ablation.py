"""Whether the warm starts and the paper's stages help: each at a quarter of its length, with it and without.

    python -m examples.nano_training.ablation

Results are kept under runs/nano/ablation, and what is there is not done again. On a GPU, stages are trained there.
"""

from dataclasses import replace
from pathlib import Path

import torch

from examples.nano_training.__main__ import DATA, RECIPES, WORK, make_data, make_start
from examples.nano_training.checkpoint import at_resolution
from examples.nano_training.scores import Scored, evaluate, group_of
from examples.nano_training.stage import DEVICE, run_stage
from examples.nano_training.start import IMAGE_SIZE
from examples.nano_training.texts import EARLY
from examples.nano_training.warm_starts import warm_starts
from finetune.recipe import load_recipe
from qwenvl import load_model, load_processor

FOLDER = WORK / "ablation"
START, WARM = FOLDER / "start", FOLDER / "warm"
SHARE = 4
"""One in so many steps, and documents."""
DOCUMENTS = 280
KINDS = ("question", "two_turn", "transcribe", "two_images")
COLUMNS = ("question", "two turn", "two images, one of them asked about")


def main() -> None:
    if not START.exists():
        make_start(START, seed=0)
    if not WARM.exists():
        warm_starts(START, FOLDER / "vision.pt", FOLDER / "language.pt", WARM, seed=0, share=SHARE)
    make_all_data()
    first = stage("stage1_pretrain", WARM, "stage1")
    second = stage("stage2_multitask", first, "stage2")
    rows = []
    for name, folder in (
        ("warm starts", full_size(WARM)),
        ("warm starts, stage 1", first),
        ("warm starts, stages 1 and 2", second),
        ("warm starts, stages 1 to 3", stage("stage3_sft", second, "stage3")),
        ("warm starts, stage 2", stage("stage2_multitask", full_size(WARM), "stage2-without-stage1")),
        ("stage 2", stage("stage2_multitask", START, "stage2-alone")),
    ):
        rows.append(row(name, scores_of(folder)))
        print(rows[-1], flush=True)
    heads = ["made by", *(f"{group}: ANLS" for group in COLUMNS), "character errors"]
    print("\n".join(["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows]))


def make_all_data() -> None:
    for name, plan in DATA.items():
        folder = FOLDER / "data" / name
        if name < "stage4" and not folder.exists():
            make_data(replace(plan, count=plan.count // SHARE), folder)


def stage(recipe: str, begin: Path, name: str) -> Path:
    """The checkpoint that a shorter run of a stage makes of another one."""
    path, done = RECIPES / f"{recipe}.yaml", FOLDER / f"{name}-at-{IMAGE_SIZE}"
    if not done.exists():
        whole = load_recipe(path)
        sources = [source.path.replace(str(WORK), str(FOLDER)) for source in whole.data.train]
        run_stage(
            path,
            f"model.path={begin}",
            f"train.max_steps={whole.train_arguments()['max_steps'] // SHARE}",
            f"output={FOLDER / name}",
            *(f"data.train.{number}.path={source}" for number, source in enumerate(sources)),
        )
        at_resolution(FOLDER / name / "model", IMAGE_SIZE, done)
    return done


def full_size(folder: Path) -> Path:
    """The checkpoint for images of the higher resolution."""
    done = folder.with_name(f"{folder.name}-at-{IMAGE_SIZE}")
    if not done.exists():
        at_resolution(folder, IMAGE_SIZE, done)
    return done


def scores_of(folder: Path) -> list[Scored]:
    model = load_model(str(folder), dtype=torch.float32).to(DEVICE)
    processor = load_processor(str(folder))
    return evaluate(model, processor, families=EARLY, kinds=KINDS, documents=DOCUMENTS, split="test", seed=0)


def row(name: str, scored: list[Scored]) -> str:
    cells = [name]
    for group in COLUMNS:
        values = [one.scores["anls"] for one in scored if group_of(one.conversation) == group]
        cells.append(f"{sum(values) / len(values):.3f}")
    errors, characters = (sum(one.scores.get(name, 0) for one in scored) for name in ("errors", "characters"))
    return f"| {' | '.join([*cells, f'{errors / characters:.1%}'])} |"


if __name__ == "__main__":
    main()

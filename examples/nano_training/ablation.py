"""Whether each part of the making of the nano helps: all of it at a twenty-fourth of its length, with it and without.

    python -m examples.nano_training.ablation

Results are kept under runs/nano/ablation, and what is there is not done again.
"""

from dataclasses import replace
from pathlib import Path

from examples.nano_documents.write import write
from examples.nano_training.__main__ import BACK, COMPARISONS, DATA, RECIPES, WORK, make_start
from examples.nano_training.arithmetic import MATRIX_DTYPE
from examples.nano_training.checkpoint import at_resolution, mix
from examples.nano_training.comparisons import write_comparisons
from examples.nano_training.scores import Scored, evaluate, group_of
from examples.nano_training.stage import run_stage
from examples.nano_training.start import IMAGE_SIZE
from examples.nano_training.texts import KNOWN_FAMILIES
from examples.nano_training.warm_starts import warm_starts
from finetune.recipe import load_recipe
from qwenvl import load_model, load_processor

FOLDER = WORK / "ablation"
SHARE = 24
"""One in so many steps, and documents."""
DOCUMENTS = 140
KINDS = ("question", "two_turn", "transcribe", "two_images")
COLUMNS = {
    "question": "anls",
    "two turn": "anls",
    "two images, one of them asked about": "anls",
    "two images, compared": "choice",
}


def main() -> None:
    start, warm = FOLDER / "start", FOLDER / "warm"
    if not start.exists():
        make_start(start, seed=0)
    if not warm.exists():
        warm_starts(start, FOLDER / "vision.pt", FOLDER / "language.pt", warm, seed=0, share=SHARE)
    make_data()
    first = stage("stage1_pretrain", warm, "stage1")
    second = stage("stage2_multitask", first, "stage2")
    third = stage("stage3_sft", second, "stage3")
    fourth = stage("stage4_cards", third, "stage4")
    mixed = FOLDER / "mixed"
    if not mixed.exists():
        mix(third, fourth, BACK, mixed)
    rows = []
    for name, folder in (
        ("warm starts", full_size(warm)),
        ("warm starts, stage 1", first),
        ("warm starts, stages 1 and 2", second),
        ("warm starts, stages 1 to 3", third),
        ("warm starts, stages 1 to 4", fourth),
        ("warm starts, stages 1 to 4, mixed", mixed),
        ("warm starts, stages 1 to 5", stage("stage5_sft", mixed, "stage5")),
        ("warm starts, stage 2", stage("stage2_multitask", full_size(warm), "stage2-without-stage1")),
        ("stage 2", stage("stage2_multitask", start, "stage2-alone")),
    ):
        rows.append(row(name, scores_of(folder)))
        print(rows[-1], flush=True)
    names = {"anls": "ANLS", "choice": "right picture"}
    heads = ["made by", *(f"{group}: {names[column]}" for group, column in COLUMNS.items()), "character errors"]
    print("\n".join(["", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows]))


def make_data() -> None:
    for name, plan in DATA.items():
        folder = FOLDER / "data" / name
        if not folder.exists():
            write(replace(plan, count=plan.count // SHARE), folder, "parquet", workers=2)
    write_comparisons(COMPARISONS // SHARE, FOLDER / "data" / "stage4-comparisons.jsonl", seed=6800)


def stage(recipe: str, begin: Path, name: str) -> Path:
    """The checkpoint that a short run of a stage makes of another."""
    path, done = RECIPES / f"{recipe}.yaml", FOLDER / f"{name}-at-{IMAGE_SIZE}"
    if not done.exists():
        whole = load_recipe(path)
        sources = [source.path.replace(str(WORK), str(FOLDER)) for source in whole.data.train]
        run_stage(
            path,
            f"model.path={begin}",
            f"train.max_steps={whole.train_arguments()['max_steps'] // SHARE}",
            "train.warmup_steps=0.05",
            f"output={FOLDER / name}",
            *(f"data.train.{number}.path={source}" for number, source in enumerate(sources)),
        )
        at_resolution(FOLDER / name / "model", IMAGE_SIZE, done)
    return done


def full_size(folder: Path) -> Path:
    done = folder.with_name(f"{folder.name}-at-{IMAGE_SIZE}")
    if not done.exists():
        at_resolution(folder, IMAGE_SIZE, done)
    return done


def scores_of(folder: Path) -> list[Scored]:
    model = load_model(str(folder), dtype=MATRIX_DTYPE)
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

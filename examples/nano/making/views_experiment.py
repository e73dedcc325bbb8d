"""Pages that are only legible in parts, and two recipes that differ in `data.views`: does a model gain from views?

    python -m examples.nano.making.views_experiment --to runs/registers
    finetune runs/registers/page.yaml
    finetune runs/registers/views.yaml

Run from the repository's root. A page has 266 pixels, and the nano's images have 140. So letters of the page as a
whole are half as high as those that the nano was trained on: numbers and capitals 5 pixels, small letters 4. A part
of the page, 1 / 1.9 of its sides, is seen at its own size. No value and no layout of a test page is on a training
page. Each recipe trains for some minutes on two CPU cores.
"""

import argparse
import sys
from pathlib import Path

from examples.nano.making.documents.write import Plan, write
from finetune.errors import UserError
from finetune.files.atomic_writes import write_text

PAGE = 266  # pixels: a part is 1 / 1.9 of it, the nano's 140
SETS = {"train": (480, 6), "test": (120, 1)}  # split -> pages, and questions about each
VIEWS = "{page: true, grid: [2, 2], overlap: 0.1}"

RECIPE = """\
# {about}
# Made by examples.nano.making.views_experiment; {other} is the same {without} data.views.
#
#     finetune {folder}/{name}.yaml

model:
  path: examples/nano
  dtype: float32

adapter:
  r: 64
  alpha: 128
  dropout: 0.0
  targets: [c_attn, attn.c_proj, w1, w2, mlp.c_proj]

data:
  train: {{path: {folder}/train.jsonl, format: messages}}
{views}  vision_cache: memory  # the vision side is frozen
  workers: 0

train:
  checkpointing: none
  num_train_epochs: 3
  per_device_train_batch_size: 16
  learning_rate: 1.5e-3
  lr_scheduler_type: cosine
  warmup_steps: 10
  logging_steps: 20
  load_best_model_at_end: false  # evaluated on the test set: choosing the best step by it would bias the score

evaluate:
  data: {{path: {folder}/test.jsonl, format: messages}}
  task: custom
  metric: anls
  predictions: 8
  max_new_tokens: 24

output: {folder}/run-{name}
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.nano.making.views_experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write pages and recipes to")
    given = parser.parse_args(arguments)
    try:
        for split, (pages, questions) in SETS.items():
            plan = Plan(split, ("register",), ("question",), pages, questions, PAGE, palette=32, joined=1.0)
            write(plan, given.to, "jsonl", workers=1)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for name in ("page", "views"):
        write_text(given.to / f"{name}.yaml", recipe(name, given.to))
    return 0


def recipe(name: str, folder: Path) -> str:
    """The recipe `page`, or `views`: the same with `data.views`."""
    has_views = name == "views"
    return RECIPE.format(
        name=name,
        folder=folder.as_posix(),
        about="Each page as a whole and in four parts." if has_views else "Each page as a whole.",
        other="page.yaml" if has_views else "views.yaml",
        without="without" if has_views else "with",
        views=f"  views: {VIEWS}\n" if has_views else "",
    )


if __name__ == "__main__":
    sys.exit(main())

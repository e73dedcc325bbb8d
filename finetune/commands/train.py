"""`finetune RECIPE [key.path=value ...]`"""

import argparse
from pathlib import Path

from finetune.commands.arguments import add_recipe
from finetune.files.output_paths import refuse_unwritable_folder
from finetune.recipe import load_recipe
from finetune.run.launch import is_main_process

SUMMARY = "train as the recipe says, or continue an interrupted run"
# A run that is stopped before training begins; one that is stopped in training saves its state.
WHEN_STOPPED = "training had not begun, so there is nothing to save"
EXAMPLES = """\
finetune recipes/quickstart.yaml
finetune recipes/docvqa_lora.yaml train.max_steps=100 output=runs/first-try
finetune recipes/docvqa_lora.yaml train.num_train_epochs=8 --extend
torchrun --nproc-per-node 2 -m finetune recipes/docvqa_lora.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--extend",
        action="store_true",
        help="go on with the run in the output folder, finished or not, for as many epochs or steps as the recipe now "
        "says; nothing else may differ",
    )


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if is_main_process():  # the one that writes
        refuse_unwritable_folder(Path(recipe.output), "the run", "output", replaced=False)
    # Nothing heavy is imported before the recipe is known to be right.
    from finetune.training.train import train

    train(recipe, extend=arguments.extend)

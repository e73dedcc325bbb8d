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
torchrun --nproc-per-node 2 -m finetune recipes/docvqa_lora.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)


def run(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if is_main_process():  # the one that writes
        refuse_unwritable_folder(Path(recipe.output), "the run", "output", replaced=False)
    # Nothing heavy is imported before the recipe is known to be right.
    from finetune.training.train import train

    train(recipe)
